"""Server options and model layers that cannot be trained in place, each with what to do about it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from apollo_tp.shards.instance import num_engines
from apollo_tp.vllm_plugin.views import held_tensors, is_view

SCALED_ROTARY_CLASSES = ("YaRNScalingRotaryEmbedding", "MRotaryEmbedding", "DeepseekScalingRotaryEmbedding")
"""Class names of vLLM's modules that scale cosines and sines by ``mscale``."""


def refusals_of_server(vllm_config: Any, model: nn.Module) -> list[str]:
    """Reasons why nothing of this server can be trained in place, each with what to do; empty if there is none."""
    return [
        *_parallelism(vllm_config.parallel_config),
        *_memory(vllm_config, model),
        *model_options(vllm_config),
        *yarn_refusals(model, vllm_config.model_config.hf_config),
        *layer_refusals(model),
        *_copied_weights(model),
    ]


def _parallelism(parallel: Any) -> Iterator[str]:
    if parallel.pipeline_parallel_size > 1:
        yield f"pipeline parallelism ({parallel.pipeline_parallel_size} stages): use tensor parallelism alone"
    if getattr(parallel, "enable_expert_parallel", False):
        yield "expert parallelism: serve without --enable-expert-parallel"
    if getattr(parallel, "enable_eplb", False):
        yield "expert load balancing (EPLB): it moves and copies experts while the server runs; serve without --enable-eplb"
    context = getattr(parallel, "prefill_context_parallel_size", 1)
    if context > 1:
        yield (
            f"prefill context parallelism ({context} ranks): several workers have one tensor-parallel rank; serve without "
            "--prefill-context-parallel-size"
        )
    if parallel.data_parallel_size > 1:  # to an engine of a dense model vLLM says that it is the only one
        yield (
            f"data parallelism of a mixture of experts ({parallel.data_parallel_size} engines, which work in step): start "
            "one server per engine without --data-parallel-size, and train them with server.replicas"
        )
    elif num_engines() > 1 and not hasattr(parallel, "data_parallel_index"):
        yield (
            f"data parallelism ({num_engines()} engines): this vLLM does not tell them apart; start one server per engine "
            "without --data-parallel-size, and train them with server.replicas"
        )
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


def model_options(vllm_config: Any) -> Iterator[str]:
    """Those of ``refusals_of_server`` that are known before the model is built, by its config and options."""
    model_config = vllm_config.model_config
    if quantization := getattr(model_config, "quantization", None):
        copy = "; transformers makes it, with Mxfp4Config(dequantize=True)" if "mxfp4" in str(quantization) else ""
        yield f"quantised weights ({quantization}): serve the bf16 checkpoint{copy}"
    if vllm_config.lora_config is not None:
        yield "LoRA-wrapped layers: serve without --enable-lora"
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


def _copied_weights(model: nn.Module) -> list[str]:
    """What layers of attention compute with and have from a weight, in memory of its own, where it would go stale: attention
    sinks in another dtype (FlashInfer), absorbed matrices of multi-head latent attention that are no views. Parameters that
    are copies are refused later, since nothing is loaded into them."""
    modules, found = dict(model.named_modules()), set()
    for name, module in modules.items():
        if not hasattr(module, "impl"):
            continue
        weights = [p for p in modules[name.rpartition(".")[0]].parameters() if p.numel()]
        for attribute, tensor in held_tensors(module):
            # vLLM's CPU backend makes its copy of fp16 sinks at the first request
            late = attribute == "sinks" and tensor.dtype == torch.float16
            served = any(tensor is weight or is_view(tensor, weight) for weight in weights)
            if late or (not served and any(_has_values_of(tensor, weight) for weight in weights)):
                found.add(f"{attribute} in {type(module.impl).__name__}")
    return [
        f"{where}: attention computes with a copy of weights, which would go stale; serve in bf16 with --attention-backend "
        "FLASH_ATTN or TRITON_ATTN (latent attention: another of its backends)"
        for where in sorted(found)
    ]


def _has_values_of(tensor: torch.Tensor, weight: torch.Tensor, count: int = 64) -> bool:
    """Whether the first numbers of ``tensor``, if they are not all the same, are among those of ``weight``."""
    if not tensor.is_floating_point() or tensor.numel() == 1:
        return False
    values = tensor.detach().flatten()[:count].float()
    return len(values.unique()) > 1 and bool(torch.isin(values, weight.detach().float()).all())


def yarn_refusals(model: nn.Module, config: Any) -> list[str]:
    """How vLLM's scale of queries and keys in YaRN differs from that of transformers; empty if it does not."""
    # vLLM release 0.26: the scale follows from ``factor`` alone, and from fields that only vLLM knows. 0.32 agrees with
    # transformers.
    expected, found = [_scale(rope) for rope in _yarn_settings(config)], set()
    if not expected:
        return []
    for module in model.modules():
        if type(module).__name__ not in SCALED_ROTARY_CLASSES or getattr(module, "scaling_factor", None) is None:
            continue
        if not any(math.isclose(module.mscale, scale, rel_tol=1e-6) for scale in expected):
            found.add(f"scales by {module.mscale:.4g}, transformers by {' or '.join(f'{s:.4g}' for s in expected)}")
        if getattr(module, "extrapolation_factor", 1) != 1:
            found.add("has an extrapolation_factor, transformers none")
    return [f"YaRN: this vLLM {difference}; use a release that agrees (0.32)" for difference in sorted(found)]


def _yarn_settings(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of type yarn in ``rope_parameters``; some models have settings for each kind of layer."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or {}
    yield from (each for each in [rope, *rope.values()] if isinstance(each, dict) and each.get("rope_type") == "yarn")


def _scale(rope: dict[str, Any]) -> float:
    """The factor of cosines and sines as transformers computes it (modeling_rope_utils); Peng et al. 2023, eq. 22."""

    def scale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    given, mscale, mscale_all_dim = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale()
