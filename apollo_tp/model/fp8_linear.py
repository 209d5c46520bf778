"""The products of ``tp_linear`` in FP8: casts, products and their sums over the ranks (``train.matmul=fp8``).

Forward, the input's gradient and the weight's are products of FP8 values with scales of their own (``fp8``), in bf16; sums
over the ranks stay in bf16, beside or within the products as in ``tp_linear``. Scales are of what this rank holds: the
products are local.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apollo_tp.distributed.collectives import operator
from apollo_tp.distributed.products import ScaledProduct
from apollo_tp.distributed.tp_group import TPGroup, group_of
from apollo_tp.model import fp8
from apollo_tp.model.fp8 import VALUES

KEEP_COLUMN_INPUTS, KEEP_ROW_INPUTS = True, False
"""Whether the FP8 transpose of the input of a column-parallel (row-parallel) product is kept for the backward pass, which
takes a byte for each value. Otherwise it is cast from the input again, which compiled code recomputes where that is cheap
and keeps where it is needed anyway, as attention's output is."""

FAST_FORWARD, FAST_GRADIENTS = True, False
"""``ScaledProduct.fast`` of the forward pass and of gradients, as in torchao's recipes."""


@operator("fp8_product(Tensor a, Tensor b, Tensor a_inverse, Tensor b_inverse, bool fast) -> Tensor")
def fp8_product(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, fast: bool) -> Tensor:
    """``ScaledProduct``: bf16 [m, n] of FP8 ``a`` [m, k] and ``b`` [n, k]. Local."""
    return ScaledProduct(a, b, a_inverse, b_inverse, fast).new()


@torch.library.register_fake("apollo_tp::fp8_product")
def _(a: Tensor, b: Tensor, _a_inverse: Tensor, _b_inverse: Tensor, _fast: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=ScaledProduct.dtype)


@operator(
    "column_backward_fp8(Tensor grad, Tensor grad_columns, Tensor x_columns, Tensor weight_columns,"
    " Tensor[] inverses, int number, Tensor? after=None) -> (Tensor, Tensor)"
)
def column_backward_fp8(
    grad: Tensor,
    grad_columns: Tensor,
    x_columns: Tensor,
    weight_columns: Tensor,
    inverses: list[Tensor],
    number: int,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``tp_linear.column_backward``, from FP8 values of the product's gradient, local [T, R], of the transposes
    [R, T padded], [C, T padded] and [C, R], and the four inverses of their scales. Returns bf16 [T, C], the same on
    all ranks, and [R, C], local. One all-reduce of [T, C], while the weight's gradient is computed."""
    of_grad, of_grad_columns, of_x, of_weight = inverses
    found: list[Tensor] = []

    def multiply_weight() -> None:
        found.append(ScaledProduct(grad_columns, x_columns, of_grad_columns, of_x, FAST_GRADIENTS).new())

    product = ScaledProduct(grad, weight_columns, of_grad, of_weight, FAST_GRADIENTS)
    return group_of(number).sum_product(product, alongside=multiply_weight), found[0]


@torch.library.register_fake("apollo_tp::column_backward_fp8")
def _(
    grad: Tensor,
    grad_columns: Tensor,
    x_columns: Tensor,
    weight_columns: Tensor,
    _inverses: list[Tensor],
    _number: int,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_x = grad.new_empty((grad.shape[0], weight_columns.shape[0]), dtype=ScaledProduct.dtype)
    return grad_x, grad.new_empty((grad_columns.shape[0], x_columns.shape[0]), dtype=ScaledProduct.dtype)


@operator(
    "row_parallel_fp8(Tensor x, Tensor weight, Tensor x_inverse, Tensor weight_inverse, int number, Tensor? after=None)"
    " -> Tensor"
)
def row_parallel_fp8(
    x: Tensor, weight: Tensor, x_inverse: Tensor, weight_inverse: Tensor, number: int, after: Tensor | None = None
) -> Tensor:
    """``fp8_product`` of local [T, C_local] and [R, C_local], summed over the group with this number: bf16 [T, R], the same
    on all ranks. One all-reduce of [T, R]."""
    return group_of(number).sum_product(ScaledProduct(x, weight, x_inverse, weight_inverse, FAST_FORWARD))


@torch.library.register_fake("apollo_tp::row_parallel_fp8")
def _(
    x: Tensor, weight: Tensor, _x_inverse: Tensor, _weight_inverse: Tensor, _number: int, after: Tensor | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=ScaledProduct.dtype)


@operator(
    "row_parallel_add_fp8(Tensor x, Tensor weight, Tensor x_inverse, Tensor weight_inverse, Tensor residual, int number,"
    " Tensor? after=None) -> Tensor"
)
def row_parallel_add_fp8(
    x: Tensor,
    weight: Tensor,
    x_inverse: Tensor,
    weight_inverse: Tensor,
    residual: Tensor,
    number: int,
    after: Tensor | None = None,
) -> Tensor:
    """``residual`` [..., R], T rows, the same on all ranks, plus what ``row_parallel_fp8`` returns, in the residual's shape.
    Used only in compiled code."""
    product = ScaledProduct(x, weight, x_inverse, weight_inverse, FAST_FORWARD)
    return group_of(number).sum_product(product, residual=residual.flatten(0, -2)).view(residual.shape)


@torch.library.register_fake("apollo_tp::row_parallel_add_fp8")
def _(
    _x: Tensor,
    _weight: Tensor,
    _x_inverse: Tensor,
    _weight_inverse: Tensor,
    residual: Tensor,
    _number: int,
    after: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


SUMS = (column_backward_fp8, row_parallel_fp8, row_parallel_add_fp8)
"""The operators of this module that sum over ranks, each once."""


def _enter(ctx: Any, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP8 rows of ``x`` [T, C] and ``weight`` [R, C], and the inverses of their scales: what ``fp8_product`` takes. Saves
    for ``_leave`` what the backward pass needs: with ``keep`` the FP8 transpose of ``x``, else ``x``."""
    weight8, weight_inverse, weight_largest = fp8.cast_rows(weight, VALUES)
    if keep:
        x8, columns, x_inverse, saved = fp8.cast([x], VALUES)
    else:
        x8, x_inverse, saved = fp8.cast_rows(x, VALUES)
    ctx.save_for_backward(columns if keep else x, saved, weight, weight_largest)
    ctx.keeps = keep
    return x8, weight8, x_inverse, weight_inverse


def _leave(ctx: Any, grads: list[Tensor]) -> tuple[fp8.Cast, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """FP8 values of the gradient of ``grads`` [T, rows of a part], and the transposes of input and weight with the inverses
    of their scales, by what was largest in the forward pass."""
    x, saved, weight, weight_largest = ctx.saved_tensors
    x_columns = (x, saved) if ctx.keeps else fp8.cast_columns(x, saved, VALUES)
    return fp8.cast(grads, fp8.GRADIENTS), x_columns, fp8.cast_columns(weight, weight_largest, VALUES)


class _ColumnParallelFp8(torch.autograd.Function):
    """``column_parallel_fp8_linear`` of a matrix, without the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: tuple[int, ...], number: int, keep: bool
    ) -> tuple[Tensor, ...]:
        ctx.number = number
        return fp8_product(*_enter(ctx, x, weight, keep), FAST_FORWARD).split(rows, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad, (x, x_inverse), (weight, weight_inverse) = _leave(ctx, list(grads))
        inverses = [grad.row_inverse, grad.inverse, x_inverse, weight_inverse]
        return *column_backward_fp8(grad.rows, grad.columns, x, weight, inverses, ctx.number), None, None, None


class _RowParallelFp8(torch.autograd.Function):
    """``row_parallel_fp8_linear`` of a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number: int, keep: bool) -> Tensor:
        return row_parallel_fp8(*_enter(ctx, x, weight, keep), number)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad, (x, x_inverse), (weight, weight_inverse) = _leave(ctx, [given])
        grad_x = fp8_product(grad.rows, weight, grad.row_inverse, weight_inverse, FAST_GRADIENTS)
        return grad_x, fp8_product(grad.columns, x, grad.inverse, x_inverse, FAST_GRADIENTS), None, None


def column_parallel_fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[int, ...], tp: TPGroup, keep: bool | None = None
) -> tuple[Tensor, ...]:
    """``tp_linear.column_parallel_linear`` in FP8: ``x`` bf16 [..., C], the same on all ranks, ``weight`` bf16, local
    [R_local, C], both dimensions multiples of fp8.MULTIPLE.

    A rank casts the whole input, its rows of the weight, and its part of the gradient, each by scales of its own. Since
    scales are powers of two, ranks together have the values of one process, but for those that are near the smallest that
    FP8 has in either. ``keep``: instead of KEEP_COLUMN_INPUTS.
    """
    keep = (KEEP_COLUMN_INPUTS if keep is None else keep) and torch.is_grad_enabled()
    parts = _ColumnParallelFp8.apply(x.flatten(0, -2), weight, rows, tp.number, keep)
    parts = tuple(part.view(*x.shape[:-1], -1) for part in parts)
    if bias is None:
        return parts
    return tuple(part + part_of_bias for part, part_of_bias in zip(parts, bias.split(rows), strict=True))


def row_parallel_fp8_linear(x: Tensor, weight: Tensor, tp: TPGroup) -> Tensor:
    """``tp_linear.row_parallel_linear`` in FP8: ``x`` bf16, local [..., C_local], ``weight`` bf16, local [R, C_local], both
    dimensions multiples of fp8.MULTIPLE. Scales are of what the rank holds; the ranks' products are summed in bf16."""
    keep = KEEP_ROW_INPUTS and torch.is_grad_enabled()
    out = _RowParallelFp8.apply(x.flatten(0, -2), weight, tp.number, keep)
    return out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
