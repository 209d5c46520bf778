"""Collectives inside a model: operators that compiled code runs as they are, and what autograd does with them.

An operator names its group by number (``TPGroup.number``), since its arguments cannot be Python objects. Its argument
``after`` is not used: compiled code puts the result of the sum there that must come before (``sum_passes.OrderSums``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from apollo_tp.distributed.tp_group import TPGroup, group_of

_P, _R = ParamSpec("_P"), TypeVar("_R")
_library = torch.library.Library("apollo_tp", "DEF")


def operator(schema: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function the operator ``apollo_tp::name`` of this ``schema``, which the compiler does not trace into.

    The decorated name becomes the operator. Its results must not share memory with its arguments.
    ``torch.library.custom_op`` would check that in every call, which would cost the host time.
    """

    def define(function: Callable[_P, _R]) -> Callable[_P, _R]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.apollo_tp, name).default  # type: ignore[no-any-return]

    return define


@operator("all_reduce(Tensor tensor, int number, Tensor? after=None) -> Tensor")
def all_reduce(tensor: Tensor, number: int, after: Tensor | None = None) -> Tensor:
    """The sum of ``tensor`` (any shape) over the group with this number, as a new contiguous tensor. One all-reduce."""
    return group_of(number).all_reduce_(tensor.clone(memory_format=torch.contiguous_format))


@torch.library.register_fake("apollo_tp::all_reduce")
def _(tensor: Tensor, _number: int, after: Tensor | None = None) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _CopyToRegion(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, number: int) -> Tensor:
        ctx.number = number
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.number), None


class _ReduceFromRegion(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, number: int) -> Tensor:
        return all_reduce(tensor, number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_region(tensor: Tensor, tp: TPGroup) -> Tensor:
    """Enter a parallel region: ``tensor`` (any shape), the same on all ranks, is returned as it is.

    Backward sums the ranks' gradients: one all-reduce.
    """
    return tensor if tp.size == 1 else _CopyToRegion.apply(tensor, tp.number)  # type: ignore[no-any-return]


def reduce_from_region(tensor: Tensor, tp: TPGroup) -> Tensor:
    """Leave a parallel region: ``tensor`` (any shape), a local partial sum, becomes the sum, the same on all ranks.

    One all-reduce in forward, none in backward.
    """
    return tensor if tp.size == 1 else _ReduceFromRegion.apply(tensor, tp.number)  # type: ignore[no-any-return]
