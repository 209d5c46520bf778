"""The tensor-parallel (TP) group as a value, and the collectives that autograd sees.

No global state: whoever needs ranks gets a ``TPGroup``. At size 1 every collective is skipped, so that one process runs
the same code. ``traffic`` counts payload bytes per kind of collective, for tests and benchmarks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TPGroup:
    """Rank and size within a group of trainer ranks, and the process group that joins them (None at size 1)."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    traffic: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    @classmethod
    def single(cls) -> TPGroup:
        """The group of one process, for reference runs."""
        return cls(rank=0, size=1)

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce ``tensor`` over the group, in place; returns it. One all-reduce."""
        if self.size > 1:
            self.traffic["all_reduce"] += tensor.nbytes
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum a contiguous (size * n, ...) tensor over the group and return this rank's (n, ...) block of rows."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:]))
        self.traffic["reduce_scatter"] += tensor.nbytes
        dist.reduce_scatter_tensor(out, tensor.contiguous(), group=self.group)
        return out

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate equal (n, ...) tensors of all ranks along dim 0 into (size * n, ...)."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty((tensor.shape[0] * self.size, *tensor.shape[1:]))
        self.traffic["all_gather"] += out.nbytes
        dist.all_gather_into_tensor(out, tensor.contiguous(), group=self.group)
        return out


class _CopyToRegion(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, tp: TPGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.tp = tp
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.tp.all_reduce_(grad.contiguous()), None


class _ReduceFromRegion(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, tp: TPGroup) -> Tensor:  # type: ignore[no-untyped-def]
        # clone: the input may be saved by the op before (a matmul's output is not, but a caller's may be)
        return tp.all_reduce_(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


def copy_to_region(tensor: Tensor, tp: TPGroup) -> Tensor:
    """Enter a parallel region: replicated in, replicated out; one all-reduce in backward."""
    return tensor if tp.size == 1 else _CopyToRegion.apply(tensor, tp)  # type: ignore[no-any-return]


def reduce_from_region(tensor: Tensor, tp: TPGroup) -> Tensor:
    """Leave a parallel region: partial sums in, replicated out; one all-reduce in forward."""
    return tensor if tp.size == 1 else _ReduceFromRegion.apply(tensor, tp)  # type: ignore[no-any-return]
