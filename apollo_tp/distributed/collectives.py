"""Collectives that autograd differentiates: entry and exit of a tensor-parallel region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apollo_tp.distributed.tp_group import TPGroup, _groups, operator


@operator("all_reduce(Tensor tensor, int number) -> Tensor")
def _all_reduce(tensor: Tensor, number: int) -> Tensor:
    """A new tensor: the sum over the group with this number."""
    return _groups[number].all_reduce_(tensor.clone(memory_format=torch.contiguous_format))


@torch.library.register_fake("apollo_tp::all_reduce")
def _(tensor: Tensor, _number: int) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _CopyToRegion(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, number: int) -> Tensor:
        ctx.number = number
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.number), None


class _ReduceFromRegion(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, number: int) -> Tensor:
        return _all_reduce(tensor, number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_region(tensor: Tensor, tp: TPGroup) -> Tensor:
    """Enter a parallel region: replicated in, replicated out; one all-reduce in backward."""
    return tensor if tp.size == 1 else _CopyToRegion.apply(tensor, tp.number)  # type: ignore[no-any-return]


def reduce_from_region(tensor: Tensor, tp: TPGroup) -> Tensor:
    """Leave a parallel region: partial sums in, replicated out; one all-reduce in forward."""
    return tensor if tp.size == 1 else _ReduceFromRegion.apply(tensor, tp.number)  # type: ignore[no-any-return]
