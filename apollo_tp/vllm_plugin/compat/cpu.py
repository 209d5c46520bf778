"""What vLLM's CPU backend needs so that all supported families are served from memory that a trainer may write to.

By default this backend serves packed copies of linear weights, of convolution weights and of experts. Here it computes
from the weights as they were loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prepare() -> None:
    """Install everything in this module. May be called any number of times."""
    serve_plain_linears()
    serve_plain_convolutions()
    serve_plain_experts()
    import_image_processors()
    let_queue_readers_sleep()


def prepare_offline() -> None:
    """What a model needs that is built and not run: its modules must be importable, and sizes of experts that only packed
    kernels refuse must be accepted."""
    from vllm.platforms import current_platform

    import_image_processors()
    if current_platform.is_cpu():
        serve_plain_experts()


def serve_plain_linears() -> None:
    """vLLM's CPU linear layers serve a oneDNN-packed copy and drop the weight; use the weight itself instead."""
    import vllm.model_executor.layers.utils as layer_utils

    def plain_gemm(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    layer_utils.dispatch_cpu_unquantized_gemm = plain_gemm


def serve_plain_convolutions() -> None:
    """Have the convolution of gated delta nets take its weight as loaded, [channels, 1, width].

    vLLM packs this weight in place at loading on CPUs with AVX512_BF16, with AMX or on ARM, in the function that
    ``serve_plain_linears`` replaces, and says to its kernels that the weight is packed. The same kernels take a plain
    weight, with the same bits as the result; they pack it for each call.
    """
    from vllm import _custom_ops

    def take_plain(name: str) -> None:
        original = getattr(_custom_ops, name, None)
        # vLLM release: not all have these kernels, nor pack the weight for them (0.32 does).
        if original is None or hasattr(original, "apollo_tp"):
            return

        @functools.wraps(original)
        def convolve(*, weight: Tensor, is_weight_packed: bool, **others: Any) -> Any:
            return original(weight=weight.view(len(weight), -1), is_weight_packed=False, **others)

        convolve.apollo_tp = True  # type: ignore[attr-defined]
        setattr(_custom_ops, name, convolve)

    take_plain("causal_conv1d_fwd_cpu")
    take_plain("causal_conv1d_update_cpu")


_TORCHVISION_MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)
_IMAGE_PROCESSORS = (
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.gemma3.image_processing_gemma3",
    "transformers.models.pixtral.image_processing_pixtral",
    "transformers.models.glm4v.image_processing_glm4v",
    "transformers.models.glm4v.video_processing_glm4v",
)


def import_image_processors() -> None:
    """Import the image processors of transformers that vLLM's modules of models with a vision tower import by name
    (Qwen3.5 among them, with or without images), over an empty torchvision if none is installed. None fits a CPU build of
    torch.

    The empty torchvision is removed afterwards, so that nothing else takes it for installed. Images are still refused: the
    processors fail as soon as they are called.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    importlib.import_module(
        "transformers"
    )  # its first import asks for the spec of torchvision, which an empty one lacks
    with _empty_torchvision():
        for name in _IMAGE_PROCESSORS:
            importlib.import_module(name)


@contextlib.contextmanager
def _empty_torchvision() -> Iterator[None]:
    modules = {name: ModuleType(name) for name in _TORCHVISION_MODULES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


_QUEUE_POLL_MS = 2


def let_queue_readers_sleep() -> None:
    """Let vLLM's engine and workers sleep until a message arrives. By default they poll their queues in a busy loop for a
    second after each message; on a CPU the trainer would have to share its cores with that loop.

    They sleep at most 2 ms at a time: a second notification soon after a first one may be dropped (the high-water mark of
    the socket is 1), which the busy loop never notices.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    original = SpinCondition.wait
    if hasattr(original, "apollo_tp"):
        return

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            original(self, timeout_ms)
        elif self.local_notify_socket in dict(self.poller.poll(_QUEUE_POLL_MS)):
            self.local_notify_socket.recv(copy=False)

    wait.apollo_tp = True  # type: ignore[attr-defined]
    SpinCondition.wait = wait  # type: ignore[method-assign]


def choose_plain_latent_attention(arguments: Any) -> None:
    """Have ``arguments`` (vLLM's EngineArgs) name the backend of latent attention that computes with the weight as loaded.

    On CPUs with AMX, vLLM's choice packs ``kv_b_proj`` and drops it. Attention of other kinds does not look at this.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # vLLM release: not all have this backend (0.32 has), or one for AMX.
    plain = AttentionBackendEnum.__members__.get("CPU_MLA")
    if current_platform.is_cpu() and plain and arguments.attention_backend is None and _has_amx():
        arguments.attention_backend = plain


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _gated(activate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of gate rows, then up rows."""

    def gate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activate(gate) * up

    return gate


def _clamped_swiglu(x: Tensor) -> Tensor:
    """gpt-oss's, of alternating gate and up rows, with the constants of vLLM's kernel."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(lambda x: F.gelu(x, approximate="tanh")),
    "swigluoai": _clamped_swiglu,
}
"""What is done to the fused product [T, 2 I] of an expert, [T, I] the result, by vLLM's name for it."""


def serve_plain_experts() -> None:
    """Compute experts from the weights as loaded, one expert after the other.

    vLLM packs expert weights on loading without changing their shape; a trainer would take them for plain weights. Experts
    that ``_apply_plain_experts`` cannot compute stay as vLLM has them, and ``untrainable`` of their layer says why.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    experts = cpu_moe.CPUUnquantizedExperts
    if hasattr(experts.apply, "apollo_tp"):
        return
    pack, apply = experts.process_weights_after_loading, experts.apply
    # vLLM release: not all have this method (0.32 has), which refuses sizes that the packed kernel cannot take.
    supports = getattr(experts, "_supports_grouped_gemm", None)

    def supports_grouped_gemm(cls: Any, moe_config: Any) -> Any:
        return supports.__func__(cls, moe_config) if supports and _not_plain(moe_config) else (True, None)

    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        if reason := _not_plain(self.moe_config):
            layer.untrainable = reason
            pack(self, layer)

    @functools.wraps(apply)
    def apply_experts(self: Any, *args: Any, **kwargs: Any) -> None:
        (apply if _not_plain(self.moe_config) else _apply_plain_experts)(self, *args, **kwargs)

    apply_experts.apollo_tp = True  # type: ignore[attr-defined]
    experts._supports_grouped_gemm = classmethod(supports_grouped_gemm)
    experts.process_weights_after_loading = process_weights_after_loading
    experts.apply = apply_experts


def _not_plain(moe_config: Any) -> str:
    """Why vLLM's packed copy of these experts must be served; empty if the plain weights can be."""
    activation = moe_config.activation.value
    if activation in _ACTIVATIONS:
        return ""
    *others, last = _ACTIVATIONS
    return (
        f"experts: got activation {activation}, expected {', '.join(others)} or {last}, since a CPU serves a packed copy of "
        "others; serve this model on GPUs"
    )


def _apply_plain_experts(
    self: nn.Module,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    *_: Any,
    apply_router_weight_on_input: bool = False,
    **__: Any,
) -> None:
    """Write into ``output`` [T, D] the sum over the chosen experts e of weight * w2[e] activation(w1[e] hidden), with biases
    after both products if there are any. The sum is in float32.

    Local shapes, I being the intermediate size of this rank: ``hidden_states`` [T, D]; ``w1`` [experts, 2 I, D]; ``w2``
    [experts, D, I]; ``topk_weights`` and ``topk_ids`` [T, chosen]; biases [experts, 2 I] and [experts, D], the latter zero
    on all ranks but one. vLLM sums ``output`` over ranks.
    """
    activate = _ACTIVATIONS[activation.value]
    first, second = (getattr(self, name, None) for name in ("w1_bias", "w2_bias"))
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, slot = torch.where(topk_ids == expert)
        fused = F.linear(hidden_states[token], w1[expert], None if first is None else first[expert])
        result = F.linear(activate(fused), w2[expert], None if second is None else second[expert]).float()
        if not apply_router_weight_on_input:
            result = result * topk_weights[token, slot, None]
        total.index_add_(0, token, result)
    output.copy_(total)
