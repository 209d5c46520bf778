"""Predicted step time and memory of R replicas at tensor-parallel size p: from a few measured numbers, by formulas.

    python benchmarks/scale_model.py                                   # the tables of docs/explanation/scale.md
    python benchmarks/scale_model.py --model 70b --gpus 128 --link 100 # another link, in GB/s for each GPU

No GPU is used. The formulas are in ``apollo_tp/training/step_model.py``.
"""

from __future__ import annotations

import argparse
import itertools

from rich.console import Console
from rich.table import Table

from apollo_tp.training.step_model import Layout, Machine, Model, predict

GPUS_OF_A_HOST = 8
KNEE = 0.2
"""More exposed exchange than this share of a step, and further replicas are hardly worth it: accumulate instead."""


MODELS = {"8b": Model(8.19e9, 36, 4096), "32b": Model(32.8e9, 64, 5120), "70b": Model(70.6e9, 80, 8192)}


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
    """Measured steps beside the predicted ones: of bench_scale.py (results/2026-11-26_scale_qwen3-8b.json), and of
    bench_replicas.py before sums ran beside the backward pass (results/2026-11-29_replicas.json)."""
    table = Table(title="8.19B, 4,096 tokens, remainder: predicted and measured")
    for column in ("replicas x TP", "predicted ms", "measured ms", "predicted GB", "measured GB"):
        table.add_column(column)
    measured = ((1, 1, 0.3546, 16.38 + 27.66), (1, 2, 0.1962, 8.19 + 15.41), (2, 1, 0.5049, 16.38 + 28.04))
    for replicas, tp, step, memory in measured:
        found = predict(MODELS["8b"], Layout(replicas, tp, 4096, machine.nvlink), machine)
        table.add_row(
            f"{replicas} x {tp}",
            f"{1e3 * found.step:.0f}",
            f"{1e3 * step:.0f}",
            f"{found.memory / 1e9:.1f}",
            f"{memory:.1f}",
        )
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
