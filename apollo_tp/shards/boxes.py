"""How tensor-parallel ranks hold the tensors of a checkpoint: pure integer arithmetic, no torch.

A *checkpoint tensor* is global: it has the name and shape found in the Hugging Face folder. A *served tensor* is what one
vLLM rank holds: often several checkpoint tensors in one (qkv_proj), often a part of each. A ``SegmentRecord`` of the
manifest ties a box of the former to a strided view of the latter. ``Shard`` is what the trainer needs of it: which global
indices along which one dimension a rank holds, and which other ranks hold exactly the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apollo_tp.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a checkpoint tensor: global ``offset`` and ``shape`` per dimension, in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """The index of this box in a tensor whose first element is at ``origin``, 0 unless given."""
        starts = [o - w for o, w in zip(self.offset, origin or (0,) * len(self.offset), strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))

    def intersection(self, other: Box) -> Box | None:
        """The block of elements that both have; None if there is none."""
        if not self.intersects(other):
            return None
        first = tuple(map(max, self.offset, other.offset))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        return Box(first, tuple(end - start for end, start in zip(ends, first, strict=True)))

    def intersects(self, other: Box) -> bool:
        """True if the two boxes share at least one element."""
        return all(
            a < b + m and b < a + n
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class ReplicatedPart:
    """``length`` local indices from ``start`` along the cut dimension, held by all of ``ranks`` (ascending)."""

    start: int
    length: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of one checkpoint tensor.

    ``ranges`` are half-open global index ranges along ``dim`` in the order in which they lie in the local tensor (more
    than one where vLLM cuts the parts of a fused tensor separately). ``dim is None`` means that the rank holds all of it.
    ``replica_ranks`` are all ranks with exactly the same content, this one included, ascending. ``replicated`` are the parts
    that other ranks hold too, also ranks whose content is not the same: key and value rows of a fused tensor.
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[tuple[int, int], ...]
    replica_ranks: tuple[int, ...]
    replicated: tuple[ReplicatedPart, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what this rank holds: the ranges concatenated along ``dim``."""
        if self.dim is None:
            return self.global_shape
        extent = sum(stop - start for start, stop in self.ranges)
        return (*self.global_shape[: self.dim], extent, *self.global_shape[self.dim + 1 :])

    @property
    def boxes(self) -> tuple[tuple[Box, int], ...]:
        """For each range its global box, and its offset along ``dim`` in the local tensor."""
        if self.dim is None:
            return ((Box((0,) * len(self.global_shape), self.global_shape), 0),)
        result, local = [], 0
        for start, stop in self.ranges:
            offset = [0] * len(self.global_shape)
            offset[self.dim] = start
            shape = (*self.global_shape[: self.dim], stop - start, *self.global_shape[self.dim + 1 :])
            result.append((Box(tuple(offset), shape), local))
            local += stop - start
        return tuple(result)


def cut_dim(name: str, global_shape: Sequence[int], boxes: Iterable[Box]) -> int | None:
    """The one dimension along which ``boxes`` of a checkpoint tensor are cut, or None if each is the full tensor.

    Raises UnsupportedModelError if a box is cut along more than one dimension, or boxes along different ones.
    """
    cut: set[int] = set()
    for box in boxes:
        cut |= {d for d, n in enumerate(global_shape) if box.shape[d] != n}
    if len(cut) > 1:
        raise UnsupportedModelError(
            f"{name} of global shape {tuple(global_shape)}: got parts cut along dimensions {sorted(cut)}, expected one; "
            "serve the model without expert parallelism or other two-dimensional sharding"
        )
    return cut.pop() if cut else None


def uncovered(global_shape: Sequence[int], boxes: Iterable[Box]) -> int:
    """Number of elements of a checkpoint tensor that no box holds. Boxes may repeat (replicas) but not partly overlap.

    Raises ValueError on a partial overlap.
    """
    distinct: list[Box] = []
    for box in boxes:
        if box in distinct:
            continue
        for other in distinct:
            if box.intersects(other):
                raise ValueError(f"boxes {box} and {other} overlap in part")
        distinct.append(box)
    return math.prod(global_shape) - sum(box.numel for box in distinct)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join neighbouring ranges that continue each other, keeping their order."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def replicated_parts(ranges_by_rank: Sequence[Sequence[tuple[int, int]]], rank: int) -> list[ReplicatedPart]:
    """The parts of ``rank``'s ranges that other ranks hold as well, in local order; global half-open index ranges.

    A fused tensor may be replicated in part: its key and value rows, but not its query rows.
    """
    bounds = sorted({bound for ranges in ranges_by_rank for pair in ranges for bound in pair})
    parts: list[ReplicatedPart] = []
    local = 0
    for start, stop in ranges_by_rank[rank]:
        if start == stop:  # a rank that has nothing shares nothing: its neighbour would not join a collective over it
            continue
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
