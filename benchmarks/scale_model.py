"""Predicted step time and memory of R replicas at tensor-parallel size p: from a few measured numbers, by formulas.

    python benchmarks/scale_model.py                                   # the tables of docs/explanation/scale.md
    python benchmarks/scale_model.py --model 70b --gpus 128 --link 100 # another link, in GB/s for each GPU

No GPU is used. The numbers that the formulas start from are in ``Machine``, each with the command that it was measured with.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

GPUS_OF_A_HOST = 8
KNEE = 0.2
"""More exposed exchange than this share of a step, and further replicas are hardly worth it: accumulate instead."""


@dataclass(frozen=True)
class Model:
    """A dense decoder: parameters, layers L, hidden size H."""

    parameters: float
    layers: int
    hidden: int


MODELS = {"8b": Model(8.19e9, 36, 4096), "32b": Model(32.8e9, 64, 5120), "70b": Model(70.6e9, 80, 8192)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--link", type=float, default=50.0, help="GB/s between hosts for each GPU")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch of each replica")
    options = parser.parse_args()
    machine = Machine()
    if options.model:
        show(options.model, options.gpus, options.link * 1e9, options.tokens, machine)
        return
    check(machine)
    for name, gpus in (("8b", 2), ("8b", 64), ("70b", 128)):
        show(name, gpus, options.link * 1e9, options.tokens, machine)


def check(machine: Machine) -> None:
    """Measured steps beside the predicted ones."""
    table = Table(title="8.19B, 4,096 tokens, remainder: predicted and measured")
    for column in ("replicas x TP", "predicted ms", "measured ms", "predicted GB", "measured GB"):
        table.add_column(column)
    for tp, step, memory in ((1, 0.3546, 16.38 + 27.66), (2, 0.1962, 8.19 + 15.41)):
        found = predict(MODELS["8b"], Layout(1, tp, 4096, machine.nvlink), machine)
        table.add_row(
            f"1 x {tp}", f"{1e3 * found.step:.0f}", f"{1e3 * step:.0f}", f"{found.memory / 1e9:.1f}", f"{memory:.1f}"
        )
    found = predict(MODELS["8b"], Layout(2, 1, 4096, machine.nvlink), machine)
    table.add_row("2 x 1", f"{1e3 * found.step:.0f}", "505", f"{found.memory / 1e9:.1f}", "44.4")
    Console(width=100).print(table)


def show(name: str, gpus: int, link: float, tokens: int, machine: Machine) -> None:
    """All ways to divide ``gpus``, with one, four and sixteen micro-batches; the knee is marked."""
    model = MODELS[name]
    inside = gpus <= GPUS_OF_A_HOST
    speed = machine.nvlink if inside else link
    table = Table(
        title=f"{name} on {gpus} GPUs, {tokens:,} tokens a micro-batch, {speed / 1e9:.0f} GB/s between replicas"
    )
    for column in ("replicas x TP", "micro-batches", "step ms", "exposed", "tokens/s", "GB sent", "GB per GPU"):
        table.add_column(column)
    for tp, micro in itertools.product((1, 2, 4, 8), (1, 4, 16)):
        if gpus % tp or gpus // tp < 1:
            continue
        layout = Layout(gpus // tp, tp, tokens, speed, micro)
        found = predict(model, layout, machine)
        share = found.exposed / found.step
        mark = " (past the knee)" if share > KNEE else ""
        table.add_row(
            f"{layout.replicas} x {tp}", str(micro), f"{1e3 * found.step:,.0f}", f"{100 * share:.0f} %{mark}",
            f"{found.tokens_per_second(layout):,.0f}", f"{found.sent / 1e9:.1f}", f"{found.memory / 1e9:.0f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
