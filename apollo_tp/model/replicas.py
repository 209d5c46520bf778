"""Which parts of a rank's shard other ranks hold too: integer arithmetic over all ranks' ranges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]


@dataclass(frozen=True)
class ReplicatedPart:
    """``length`` local indices from ``start`` along the cut dimension, held by all of ``ranks`` (ascending)."""

    start: int
    length: int
    ranks: tuple[int, ...]


def replicated_parts(ranges_by_rank: Sequence[Sequence[Range]], rank: int) -> list[ReplicatedPart]:
    """The parts of ``rank``'s ranges that other ranks hold as well, in local order; global half-open index ranges.

    A fused tensor may be replicated in part: its key and value rows, but not its query rows.
    """
    bounds = sorted({bound for ranges in ranges_by_rank for pair in ranges for bound in pair})
    parts: list[ReplicatedPart] = []
    local = 0
    for start, stop in ranges_by_rank[rank]:
        inner = [start, *(b for b in bounds if start < b < stop), stop]
        for low, high in itertools.pairwise(inner):
            holders = tuple(
                r for r, ranges in enumerate(ranges_by_rank) if any(a <= low and high <= b for a, b in ranges)
            )
            if len(holders) > 1:
                previous = parts[-1] if parts else None
                if previous and previous.ranks == holders and previous.start + previous.length == local:
                    parts[-1] = ReplicatedPart(previous.start, previous.length + high - low, holders)
                else:
                    parts.append(ReplicatedPart(local, high - low, holders))
            local += high - low
    return parts
