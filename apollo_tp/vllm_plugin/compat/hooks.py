"""Hooks in vLLM's model loaders and in its engine configuration.

They replace attributes that vLLM looks up at call time. ``install_hooks`` may be called any number of times.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from apollo_tp.shards.instance import ENDPOINTS_VARIABLE, ENGINES_VARIABLE
from apollo_tp.vllm_plugin.compat import cpu
from apollo_tp.vllm_plugin.compat.config import load_format

OnLoaded = Callable[[nn.Module, Any, Any], None]


def install_hooks(on_loaded: OnLoaded) -> None:
    """Have ``on_loaded(model, vllm_config, model_config)`` called in each worker.

    The call comes after the weights are loaded and processed, and before profiling, compilation and CUDA graph capture. On
    a CPU, layers are kept from serving packed copies of their weights.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cpu.prepare()
    if hasattr(BaseModelLoader.load_model, "apollo_tp"):
        return
    for loader in [BaseModelLoader, *_loaders_with_own_method(BaseModelLoader)]:
        _call_after_load(loader, on_loaded, is_base=loader is BaseModelLoader)
    _record_engine_count()


def _loaders_with_own_method(base: type) -> Iterator[type]:
    """Loader classes below ``base`` that override ``load_model`` (tensorizer's, for one)."""
    for loader in base.__subclasses__():
        if "load_model" in vars(loader):
            yield loader
        yield from _loaders_with_own_method(loader)


def _call_after_load(loader: Any, on_loaded: OnLoaded, *, is_base: bool) -> None:
    """Wrap ``loader.load_model``. A model that only an overriding method has loaded is marked ``untrainable``: nothing is
    known about where such a method puts the weights."""
    original = loader.load_model

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = original(self, vllm_config, model_config, *args, **kwargs)
        # An overriding method may have called the one of the base class, which has reported the model already.
        if not is_draft(vllm_config, model_config) and not hasattr(model, "apollo_tp"):
            model.apollo_tp = True  # type: ignore[assignment]
            if not is_base:
                model.untrainable = (  # type: ignore[assignment]
                    f"--load-format {load_format(vllm_config)}: it does not load weights in vLLM's usual way; serve with "
                    "--load-format auto"
                )
            on_loaded(model, vllm_config, model_config)
        return model

    load_model.apollo_tp = True  # type: ignore[attr-defined]
    loader.load_model = load_model


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether this is the draft model of speculative decoding. Some drafts are loaded by a ``vllm_config`` of their own."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft, target = (getattr(speculative, f"{which}_model_config", None) for which in ("draft", "target"))
    # N-gram speculation has the target as its draft.
    return model_config is not vllm_config.model_config or (model_config is draft and draft is not target)


def _record_engine_count() -> None:
    """Write the number of engines, and whether an API server comes up, into the environment of the processes that vLLM
    starts after it has made its configuration: to each engine of a dense model vLLM says that it is the only one. Before,
    the backend of latent attention is chosen where it matters."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        cpu.choose_plain_latent_attention(self)
        config = original(self, *args, **kwargs)
        os.environ[ENGINES_VARIABLE] = str(config.parallel_config.data_parallel_size)
        os.environ[ENDPOINTS_VARIABLE] = "1" if has_endpoints(*args, **kwargs) else ""
        return config

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def has_endpoints(usage_context: Any = None, headless: bool = False) -> bool:
    """Whether an API server that loads endpoint plugins comes up in front of the engine.

    None does for a vllm.LLM, a batch, or in headless mode, nor with vLLM's front ends in Rust and for gRPC, although these
    give the usage context of an API server.
    """
    server = str(getattr(usage_context, "value", usage_context)) == "OPENAI_API_SERVER"
    module = Path(
        sys.argv[0]
    ).stem  # With python -m this is the module's file; only `vllm serve` has the Rust front end.
    rust = uses_rust_frontend() and module != "api_server"
    # vLLM release: depending on it, the gRPC server is a module of its own (grpc_server.py), an option (--grpc), or both.
    return server and not headless and not rust and module != "grpc_server" and "--grpc" not in sys.argv


def uses_rust_frontend() -> bool:
    """Whether `vllm serve` starts vLLM's front end in Rust."""
    return os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0"
