"""Completing, once per step, the gradients that each rank of a replica group holds a part of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_tp.layout import Shard, replicated_parts
from apollo_tp.parallel import TPGroup

BUCKET_BYTES = 64 * 2**20
"""Gradients are joined into flat buffers of about this size, one all-reduce each."""


@dataclass(frozen=True)
class _Slice:
    """``length`` indices from ``start`` along ``dim`` of a leaf's gradient; all of it if ``dim`` is None."""

    leaf: nn.Parameter
    index: tuple[int | slice, ...]
    dim: int | None
    start: int
    length: int

    def gradient(self) -> Tensor:
        if self.leaf.grad is None:  # another rank may have one, and all must join the collective
            self.leaf.grad = torch.zeros_like(self.leaf)
        grad = self.leaf.grad[self.index]
        return grad if self.dim is None else grad.narrow(self.dim, self.start, self.length)


class GradientSync:
    """Sums over replicas the gradients of tensors inside parallel regions that more than one rank holds.

    ``shards`` lists, in the same order on all ranks, this rank's shards inside regions with the place of their gradient
    (leaf, index). Construction is collective over ``tp``: one all-gather of the index ranges, and one process group per
    distinct set of replicas.
    """

    def __init__(self, shards: Sequence[tuple[Shard, nn.Parameter, tuple[int | slice, ...]]], tp: TPGroup) -> None:
        self._slices: dict[tuple[int, ...], list[_Slice]] = defaultdict(list)
        self.partial: set[str] = set()
        if tp.size == 1:
            return
        groups: set[tuple[int, ...]] = set()
        for (shard, leaf, index), ranges in zip(shards, _gather_ranges(shards, tp), strict=True):
            if shard.dim is None:
                everyone = tuple(range(tp.size))
                groups.add(everyone)
                self._slices[everyone].append(_Slice(leaf, index, None, 0, 0))
                self.partial.add(shard.name)
                continue
            for rank in range(tp.size):
                for part in replicated_parts(ranges, rank):
                    groups.add(part.ranks)
                    if rank == tp.rank:
                        self._slices[part.ranks].append(_Slice(leaf, index, shard.dim, part.start, part.length))
                        self.partial.add(shard.name)
        self._groups = {
            ranks: tp.subgroup(ranks) for ranks in sorted(groups)
        }  # collective: the same order on all ranks

    def finish(self) -> None:
        """Sum in place: per replica group and dtype, one all-reduce for every BUCKET_BYTES."""
        for ranks in sorted(self._slices):
            by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
            for part in self._slices[ranks]:
                if part.leaf.requires_grad:
                    gradient = part.gradient()
                    by_dtype[gradient.dtype].append(gradient)
            for gradients in by_dtype.values():
                for bucket in _buckets(gradients):
                    self._sum(bucket, ranks)

    def _sum(self, gradients: list[Tensor], ranks: tuple[int, ...]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._groups[ranks].all_reduce_(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view(gradient.shape))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if not buckets or gradient.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(gradient)
        room -= gradient.nbytes
    return buckets


def _gather_ranges(
    shards: Sequence[tuple[Shard, nn.Parameter, tuple[int | slice, ...]]], tp: TPGroup
) -> list[list[list[tuple[int, int]]]]:
    """Per shard and rank: the global index ranges that the rank holds. One max all-reduce and one all-gather."""
    if not shards:
        return []
    device = shards[0][1].device
    widest = torch.tensor([max(len(shard.ranges) for shard, _, _ in shards)], device=device)
    tp.all_reduce_(widest, dist.ReduceOp.MAX)
    width = int(widest)
    rows = [[*shard.ranges, *[(-1, -1)] * (width - len(shard.ranges))] for shard, _, _ in shards]
    local = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width, 2)
    gathered = tp.all_gather(local).view(tp.size, len(rows), width, 2).tolist()
    return [
        [[(start, stop) for start, stop in gathered[rank][i] if start >= 0] for rank in range(tp.size)]
        for i in range(len(rows))
    ]
