"""Server options and model layers that cannot be trained in place, each with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from apollo_tp.vllm_plugin.compat.hooks import ENGINES_VARIABLE
from apollo_tp.vllm_plugin.compat.rotary import yarn_refusals


def refusals_of_server(vllm_config: Any, model: nn.Module) -> list[str]:
    """Reasons why nothing of this server can be trained in place, each with what to do; empty if there is none."""
    return [
        *_parallelism(vllm_config.parallel_config),
        *_memory(vllm_config, model),
        *_model_options(vllm_config),
        *yarn_refusals(model, vllm_config.model_config.hf_config),
        *layer_refusals(model),
    ]


def _parallelism(parallel: Any) -> Iterator[str]:
    if parallel.pipeline_parallel_size > 1:
        yield f"pipeline parallelism ({parallel.pipeline_parallel_size} stages): use tensor parallelism alone"
    if getattr(parallel, "enable_expert_parallel", False):
        yield "expert parallelism: serve without --enable-expert-parallel"
    engines = max(parallel.data_parallel_size, int(os.environ.get(ENGINES_VARIABLE) or 1))
    if engines > 1 or getattr(parallel, "data_parallel_index", 0):
        yield f"data parallelism ({engines} engines): start one server per engine"
    executor = getattr(parallel, "distributed_executor_backend", None)  # a name or a class
    if "ray" in (executor, getattr(parallel, "data_parallel_backend", "")) or getattr(executor, "uses_ray", False):
        yield (
            "Ray: its actors do not share this server's processes and environment; serve with "
            "--distributed-executor-backend mp, and no --data-parallel-backend ray"
        )


def _memory(vllm_config: Any, model: nn.Module) -> Iterator[str]:
    """Memory that another process cannot map, or that is not where inference reads the weights."""
    model_config = vllm_config.model_config
    # vLLM release: not all have both of these fields (0.32 has).
    if getattr(model_config, "enable_sleep_mode", False) or getattr(model_config, "enable_cumem_allocator", False):
        yield "sleep mode (cumem allocator): its memory cannot be exported; serve without --enable-sleep-mode"
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:true" in allocator.lower():
        yield "expandable segments: unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF of the server"
    if torch.device(vllm_config.device_config.device).type == "cuda" and any(
        parameter.device.type == "cpu" or getattr(parameter, "_vllm_is_uva_offloaded", False)
        for parameter in model.parameters()
    ):
        yield "weights offloaded to the host's memory: serve without --cpu-offload-gb and other offloading"


def _model_options(vllm_config: Any) -> Iterator[str]:
    model_config = vllm_config.model_config
    if getattr(model_config, "quantization", None):
        yield f"quantised weights ({model_config.quantization}): serve the bf16 checkpoint"
    if vllm_config.lora_config is not None:
        yield "LoRA-wrapped layers: serve without --enable-lora"
    if getattr(model_config, "use_mla", False):
        yield "multi-head latent attention: vLLM serves derived copies of kv_b_proj, which would go stale"
    overrides = getattr(model_config, "hf_overrides", None) or {}
    if callable(overrides) or any(name.endswith("_config") for name in overrides):
        yield "--hf-overrides by a function, or of a part's config: only fields of the model's own are passed on"
    if getattr(model_config, "hf_config_path", None):
        yield "--hf-config-path: the trainer reads the model's folder; put config.json there"
    if getattr(model_config.hf_config, "is_encoder_decoder", False):
        yield "encoder-decoder model: only decoder-only models are trained"


def layer_refusals(model: nn.Module) -> list[str]:
    """What the hooks wrote into ``untrainable`` of the model or its layers while it was loaded, and backends of vLLM's
    experts that rearrange weights without changing their shape."""
    backends, reasons = set(), set()
    for module in model.modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None:
            backends.add(getattr(backend, "value", str(backend)).upper())
        reasons.add(getattr(module, "untrainable", ""))
    return sorted(reasons - {""}) + [
        f"mixture-of-experts backend {backend}: it reorders expert weights; serve with --moe-backend triton"
        for backend in sorted(backends - {"TRITON", "CPU", "NONE"})
    ]
