"""What vLLM's CPU backend needs so that all supported families are served from memory that a trainer may write to."""

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

_STAND_INS = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)
_IMPORTERS = (
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.gemma3.image_processing_gemma3",
)


def import_image_processors() -> None:
    """Import transformers' image processors that vLLM's modules of models with a vision tower (Qwen3.5 among them, text
    or not) import by name; with an empty torchvision if there is none, as beside a CPU build of torch.

    The stand-in is gone afterwards, so that nothing else takes torchvision for installed. Images are still refused: the
    processors fail as soon as they are called.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return

    with _stand_in():
        for name in _IMPORTERS:
            importlib.import_module(name)


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    modules = {name: ModuleType(name) for name in _STAND_INS}
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
    """vLLM's engine and workers look into their message queues in a busy loop for a second after each message. On a CPU
    they share their cores with the trainer, which would get what the scheduler leaves; sleep until the writer notifies.

    Not for longer than 2 ms at a time: a second notification soon after a first may be dropped (the socket's high-water
    mark is 1), which the busy loop never notices.
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


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def serve_plain_experts() -> None:
    """vLLM's CPU experts are packed on load within an unchanged shape, which a trainer would take for plain weights; use
    the weights as loaded, expert by expert. Others than ``_apply_plain_experts`` can compute stay as vLLM has them, and
    their layer says so in ``untrainable``."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    experts = cpu_moe.CPUUnquantizedExperts
    if hasattr(experts.apply, "apollo_tp"):
        return
    pack, apply = experts.process_weights_after_loading, experts.apply
    supports = getattr(experts, "_supports_grouped_gemm", None)  # not in all releases

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
    """Why vLLM's packed copy of these experts must be served; "" if the plain weights can be."""
    activation, has_biases = moe_config.activation.value, moe_config.has_bias
    if activation in _ACTIVATIONS and not has_biases:
        return ""
    *others, last = _ACTIVATIONS
    return (
        f"experts: got activation {activation} {'with' if has_biases else 'without'} biases, expected "
        f"{', '.join(others)} or {last} without, since a CPU serves a packed copy of others; serve this model on GPUs"
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
    """``output`` [n, H] = sum over chosen experts of weight * w2[e] (act(gate) * up), (gate, up) = w1[e] hidden."""
    activate = _ACTIVATIONS[activation.value]
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, slot = torch.where(topk_ids == expert)
        gate, up = F.linear(hidden_states[token], w1[expert]).chunk(2, dim=-1)
        result = F.linear(activate(gate) * up, w2[expert]).float()
        if not apply_router_weight_on_input:
            result = result * topk_weights[token, slot, None]
        total.index_add_(0, token, result)
    output.copy_(total)
