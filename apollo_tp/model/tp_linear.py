"""Column- and row-parallel products together with their sums over the ranks.

Column-parallel: the sum of the input's gradient runs while the weight's gradient is computed (Narayanan et al. 2021, as
Megatron-LM does it). Row-parallel: the product lands where it is summed. Each is one operator, so that compiled code keeps
the order of what happens within.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apollo_tp.parallel import TPGroup, group_number, operator


@operator("column_backward(Tensor grad, Tensor x, Tensor weight, int number) -> (Tensor, Tensor)")
def _column_backward(grad: Tensor, x: Tensor, weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``x @ weight.T``: that of x [..., in] summed over the group with this number, that of weight local."""
    rows = grad.flatten(0, -2)
    grad_weight = torch.empty_like(weight)
    grad_x = group_number(number).summed_product(
        rows, weight, beside=lambda: torch.mm(rows.T, x.flatten(0, -2), out=grad_weight)
    )
    return grad_x.view(x.shape), grad_weight


@torch.library.register_fake("apollo_tp::column_backward")
def _(_grad: Tensor, x: Tensor, weight: Tensor, _number: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


@operator("row_parallel(Tensor x, Tensor weight, int number) -> Tensor")
def _row_forward(x: Tensor, weight: Tensor, number: int) -> Tensor:
    """``x @ weight.T`` [..., out] summed over the group with this number."""
    out = group_number(number).summed_product(x.flatten(0, -2), weight.T)
    return out.view(*x.shape[:-1], -1)


@torch.library.register_fake("apollo_tp::row_parallel")
def _(x: Tensor, weight: Tensor, _number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.number = number
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_column_backward(grad.contiguous(), x, weight, ctx.number), None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _row_forward(x, weight, number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), None


def column_parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TPGroup) -> Tensor:
    """Enter a parallel region by a product: ``x`` [..., in], the same on all ranks, ``weight`` local [out / p, in].

    Returns local [..., out / p]. One all-reduce of x's gradient in backward.
    """
    if tp.size == 1:
        return F.linear(x, weight, bias)
    out = _ColumnParallel.apply(x, weight, tp.number)
    return out if bias is None else out + bias  # type: ignore[no-any-return]


def row_parallel_linear(x: Tensor, weight: Tensor, tp: TPGroup) -> Tensor:
    """Leave a parallel region by a product: ``x`` local [..., in / p], ``weight`` local [out, in / p].

    Returns [..., out], the same on all ranks. One all-reduce in forward, by blocks of tokens.
    """
    return F.linear(x, weight) if tp.size == 1 else _RowParallel.apply(x, weight, tp.number)  # type: ignore[no-any-return]
