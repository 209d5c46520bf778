"""The table of docs/how-to/plan.md: which models fit on how many GPUs, with which options, and how fast.

    python benchmarks/plan_table.py         # no GPU is used, and no hub: the models' shapes are in model_shapes.json

Computed by what `apollo-tp plan` computes with.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

from apollo_tp.cli.plan import Gpus, Row, rows
from apollo_tp.training.estimate import Estimate

SHAPES = Path(__file__).parent / "model_shapes.json"
COUNTS = (1, 2, 4, 8)
GPUS = (("H100", 80), ("H200", 141))
TOKENS, LENGTH, CONCURRENCY = 4096, 4096, 16
SHORT = {
    "train.gradient_checkpointing=true": "R",
    "train.gradients=in_backward": "B",
    "train.precision=stochastic": "S",
}


def cell(found: list[Row]) -> str:
    """Of the first choice that fits: its options' letters, GB and tokens per second."""
    best = next((row for row in found if row.fits), None)
    if best is None:
        return f"no ({min(row.total for row in found) / 1e9:.0f} GB)"
    letters = "".join(letter for option, letter in SHORT.items() if option in best.options)
    return f"{letters and letters + ', '}{best.total / 1e9:.0f} GB, {round(best.tokens_per_second or 0, -2):,.0f}"


def table() -> list[str]:
    """Lines of Markdown."""
    lines = [f"| model | GPU | {' | '.join(map(str, COUNTS))} |", f"|---|---|{'---|' * len(COUNTS)}"]
    for name, shape in json.loads(SHAPES.read_text()).items():
        config = AutoConfig.for_model(**shape)
        estimates = [Estimate(config, count) for count in COUNTS]
        for gpu, gigabytes in GPUS:
            cells = [
                cell(rows(each, Gpus(each.size, gpu, gigabytes), tokens=TOKENS, kv_tokens=LENGTH * CONCURRENCY))
                for each in estimates
            ]
            lines.append(f"| {name} | {gigabytes} GB | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
