"""Once per step: gradients that each rank of a replica group has a partial sum of are completed, and all ranks are given the
same gradients of replicated tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ReplicaError
from apollo_tp.shards.boxes import Shard, replicated_parts

BUCKET_BYTES = 64 * 2**20
"""Gradients are joined into flat buffers of at most this size (a larger one has its own), one collective each."""
MAX_DIFFERENCE, NEGLIGIBLE = 0.25, 0.01
"""By how much ranks may differ in a gradient that each computes in full: by the first share of its norm, far above what
rounding does and far below what a missing sum over ranks does; or by the second share of the largest norm among such
gradients, since a gradient whose exact value is zero consists of rounding errors only."""


@dataclass(frozen=True)
class _Slice:
    """``length`` local indices from ``start`` along ``dim`` of ``leaf.grad[index]``; all of it if ``dim`` is None."""

    leaf: nn.Parameter
    index: tuple[int | slice, ...]
    dim: int | None
    start: int
    length: int

    def gradient(self) -> Tensor:
        """The local view of the gradient, in the leaf's dtype; zeros are put there if the leaf has none."""
        if self.leaf.grad is None:  # another rank may have one, and all must join the collective
            self.leaf.grad = torch.zeros_like(self.leaf)
        grad = self.leaf.grad[self.index]
        return grad if self.dim is None else grad.narrow(self.dim, self.start, self.length)


GradientLocation = tuple[Shard, nn.Parameter, tuple[int | slice, ...]]
"""A shard and where its gradient is: ``leaf.grad[index]``."""


class GradientSync:
    """Sums over replicas the gradients of tensors inside parallel regions that more than one rank has, and gives all ranks
    rank 0's gradients of tensors outside, such as norms.

    Outside, every rank computes the full gradient from the same numbers, but not always the same bits: on two GPUs
    replicas diverged within 100 steps, most likely because compiled code added in another order
    (docs/decisions/replicas-and-determinism.md). A gradient that differs by more than rounding lacks a sum over ranks,
    and would train only rank 0's share: ``compare`` finds it.

    ``inside`` and ``outside`` list gradients in the same order on all ranks; ``bucket_bytes`` is the same on all ranks.
    Construction is collective over ``tp``: one all-gather of a number, one of the index ranges, and one process group for
    each distinct set of replicas.
    """

    def __init__(
        self,
        inside: Sequence[GradientLocation],
        outside: Sequence[GradientLocation],
        tp: TPGroup,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._tp = tp
        self.bucket_bytes = bucket_bytes
        self._slices: dict[tuple[int, ...], list[_Slice]] = defaultdict(list)
        self._names: list[str] = []
        self._replicated: list[_Slice] = []
        self.partial: set[str] = set()
        if tp.size == 1:
            return
        replicated = [
            (shard.name, _Slice(leaf, index, None, 0, 0)) for shard, leaf, index in outside if shard.dim is None
        ]
        self._names, self._replicated = [name for name, _ in replicated], [part for _, part in replicated]
        groups: set[tuple[int, ...]] = set()
        for (shard, leaf, index), ranges in zip(inside, _gather_ranges(inside, tp), strict=True):
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

    def finish(self, *, compare: bool) -> Tensor | None:
        """In place: per replica group and dtype, one all-reduce for every ``bucket_bytes``; then broadcasts likewise.

        Returns 1 (fp32 [1]) if each of them has happened on this rank, by the canary that it carries, else 0; None if there
        are none. Nothing waits for this number, and where it is 0 the gradients may be anything: the optimizer must not
        write if it is 0 on some rank.

        With ``compare``, one all-reduce more, of a float for each gradient outside. Raises ReplicaError on all ranks if one
        differs between ranks by more than rounding; rank 0's gradients are broadcast all the same.
        """
        trained = [
            (n, s) for n, s in zip(self._names, self._replicated, strict=True) if compare and s.leaf.requires_grad
        ]
        own = [part.gradient().clone() for _, part in trained]
        arrived: list[Tensor] = []
        for ranks in sorted(self._slices):
            group, buckets = self._groups[ranks], _buckets(self._slices[ranks], self.bucket_bytes)
            arrived += [_concatenated(bucket, group.all_reduce_, 1.0) == group.size for bucket in buckets]
        canary = 1.0 if self._tp.rank == 0 else torch.nan
        buckets = _buckets(self._replicated, self.bucket_bytes)
        arrived += [_concatenated(bucket, self._tp.broadcast_, canary) == 1.0 for bucket in buckets]
        if trained:
            self._compare([name for name, _ in trained], own, [part.gradient() for _, part in trained])
        return torch.cat(arrived).all().float()[None] if arrived else None

    def _compare(self, names: Sequence[str], own: list[Tensor], given: list[Tensor]) -> None:
        """Compare this rank's ``own`` gradients with those of rank 0 (``given``). One all-reduce of fp32 [len(names)]."""
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(given)])
        apart = torch._foreach_norm(torch._foreach_sub(own, given))
        distances = torch.stack([norm.float() for norm in apart]).nan_to_num(0.0)
        self._tp.all_reduce_(distances, dist.ReduceOp.MAX)  # without NaN, which backends treat differently
        wrong = (distances > MAX_DIFFERENCE * norms) & (distances > NEGLIGIBLE * norms.max())
        if (indices := wrong.nonzero().flatten().tolist()) == []:
            return
        found = [f"{names[i]} by {float(distances[i]):.3g} of {float(norms[i]):.3g}" for i in indices[:3]]
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        raise ReplicaError(
            f"gradients of replicated tensors: got ranks that differ from rank 0 in {', '.join(found)}{more} (norms), "
            f"expected at most {MAX_DIFFERENCE:g} of the norm, far more than rounding; a sum over ranks is missing in "
            "the model's backward pass, so do not train it: report the model. optim.check_replicas_every=0 stops the checks"
        )


def _concatenated(gradients: list[Tensor], collective: Callable[[Tensor], Tensor], canary: float) -> Tensor:
    """Replace the local gradients (any shapes, one dtype) by what one ``collective`` makes of their concatenation, with
    ``canary`` as its last element. Returns what it made of the canary, [1] in the gradients' dtype."""
    last = gradients[0].new_full((1,), canary)
    flat = collective(torch.cat([*(gradient.reshape(-1) for gradient in gradients), last]))
    *parts, made = flat.split([*(gradient.numel() for gradient in gradients), 1])
    torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])
    return made


def _buckets(slices: Sequence[_Slice], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """The gradients of what is trained, of one dtype and about ``bucket_bytes`` at a time."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for part in slices:
        if part.leaf.requires_grad:
            gradient = part.gradient()
            by_dtype[gradient.dtype].append(gradient)
    for gradients in by_dtype.values():
        bucket, size = [], 0
        for gradient in gradients:
            if bucket and size + gradient.nbytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket


def _gather_ranges(shards: Sequence[GradientLocation], tp: TPGroup) -> list[list[list[tuple[int, int]]]]:
    """Per shard and rank: the global index ranges that the rank has. Two all-gathers."""
    if not shards:
        return []
    device = shards[0][1].device
    widest = torch.tensor([max(len(shard.ranges) for shard, _, _ in shards)], device=device)
    width = int(tp.gather_checked(widest, "number of index ranges").max())
    rows = [[*shard.ranges, *[(-1, -1)] * (width - len(shard.ranges))] for shard, _, _ in shards]
    local = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width, 2)
    gathered = tp.gather_checked(local, "index ranges").tolist()
    return [
        [[(start, stop) for start, stop in gathered[rank][i] if start >= 0] for rank in range(tp.size)]
        for i in range(len(rows))
    ]
