"""What is covered and what is refused of a model, by which rule: one table, a row for all layers with the same answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table

from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.placement import place_what_fits, second_copies

TRAINED, COPY, CARRIED, REFUSED = "trained", "second copy", "carried over", "refused"


def verdicts(manifests: Sequence[Manifest]) -> list[tuple[str, str, str]]:
    """(checkpoint tensor, verdict, rule) of each, in checkpoint order; then of served tensors that no other explains."""
    placements, problems = place_what_fits(manifests)
    copies = second_copies(manifests)
    rows = []
    for tensor in manifests[0].checkpoint:
        if tensor.name in problems:
            rows.append((tensor.name, REFUSED, problems.pop(tensor.name)))
        elif tensor.name in copies:
            rows.append(
                (tensor.name, COPY, f"of {copies[tensor.name]}: written into checkpoints with its trained values")
            )
        elif tensor.name in placements[0]:
            rows.append((tensor.name, TRAINED, _cut(placements[0][tensor.name].shard.dim)))
        else:
            rows.append((tensor.name, CARRIED, "not held by the server: copied into checkpoints as it is"))
    return rows + [(name, REFUSED, reason) for name, reason in problems.items()]


def _cut(dim: int | None) -> str:
    return "whole on each rank" if dim is None else f"cut on dimension {dim}"


def table(rows: Sequence[tuple[str, str, str]]) -> Table:
    """Rows whose names differ in numbers alone are one, with how many there are."""
    merged: dict[tuple[str, str, str], int] = {}
    for name, verdict, rule in rows:
        key = re.sub(r"\d+", "*", name), verdict, re.sub(r"(?<=\.)\d+(?=\.)", "*", rule)
        merged[key] = merged.get(key, 0) + 1
    result = Table("checkpoint tensors", "number", "verdict", "rule")
    for (name, verdict, rule), number in merged.items():
        result.add_row(name, str(number), verdict, rule)
    return result
