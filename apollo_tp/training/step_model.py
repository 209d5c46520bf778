"""Predicted time and memory of a step of R replicas at tensor-parallel size p: from a few measured numbers, by formulas.

The formulas are those of docs/explanation/scale.md. The numbers that they start from are in ``Machine``, each with the
command that it was measured with. Only arithmetic, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A dense decoder: parameters, layers L, hidden size H."""

    parameters: float
    layers: int
    hidden: int


@dataclass(frozen=True)
class Machine:
    """H200. Rates and shares from ``bench_scale.py --tp 1 2`` (benchmarks/results/2026-11-26_scale_qwen3-8b.json)."""

    flops: float = 6 * 8.19e9 * 4096 / (0.123 + 0.210)
    """Work of forward and backward pass at TP = 1, per second."""
    backward_share: float = 0.210 / (0.123 + 0.210)
    sum_bandwidth: float = 4 * 36 * 4096 * 4096 * 2 / (0.0694 + 0.1152 - (0.123 + 0.210) / 2)
    """Bytes per second of sums over two TP ranks that the passes wait for: what TP = 2 takes beyond half of TP = 1."""
    optimizer_seconds: float = 0.021 / 8.19e9
    """Per parameter that a rank updates, with remainder."""
    copy_bandwidth: float = 3.6e12
    """Of the copy into served memory, three passes over it: three quarters of the published 4.8 TB/s; not measured."""
    nvlink: float = 2e9 / 7.1e-3
    """Of a reduce-scatter and of an all-gather: 4 GB over two GPUs in 7.1 ms, so 2 GB sent by each (NCCL)."""
    state_bytes: float = 1.14e9 / 8.19e9
    """Of the optimizer's moments at rank 64, per parameter."""
    activation_bytes: float = 1.95e9 / (36 * 4096 * 4096)
    """At the peak beside all gradients, per layer, token and hidden unit."""


@dataclass(frozen=True)
class Layout:
    """R replicas of p ranks, each on ``tokens`` tokens in ``micro_batches`` parts; ``link`` is in bytes per second and GPU
    between replicas."""

    replicas: int
    tp: int
    tokens: int
    link: float
    micro_batches: int = 1


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and of what is exposed of the exchange, bytes sent by each GPU, and bytes of its memory."""

    step: float
    exposed: float
    sent: float
    memory: float

    def tokens_per_second(self, layout: Layout) -> float:
        return layout.replicas * layout.tokens * layout.micro_batches / self.step


def predict(model: Model, layout: Layout, machine: Machine) -> Prediction:
    """The formulas of docs/explanation/scale.md."""
    n, p, r = model.parameters, layout.tp, layout.replicas
    passes = 6 * n * layout.tokens / (p * machine.flops)
    if p > 1:  # four sums of [tokens, hidden] in bf16 a layer, each as 2 (p - 1) / p of its bytes on the wire
        passes += 8 * (p - 1) / p * model.layers * layout.tokens * model.hidden * 2 / machine.sum_bandwidth
    half = (r - 1) / r * 2 * n / p  # bytes of a reduce-scatter of gradients, and of an all-gather of weights
    hidden = machine.backward_share * passes  # the reduce-scatter runs beside the last backward pass
    copy = 3 * half / machine.copy_bandwidth
    exposed = max(0.0, half / layout.link - hidden) + half / layout.link + copy if r > 1 else 0.0
    optimizer = machine.optimizer_seconds * n / (p * r)
    activations = machine.activation_bytes * model.layers * layout.tokens * model.hidden
    own = (machine.state_bytes + 1) * n / (p * r)  # moments and the int8 remainder
    memory = 2 * n / p + 2 * n / p + own + activations
    return Prediction(layout.micro_batches * passes + optimizer + exposed, exposed, 2 * half, memory)
