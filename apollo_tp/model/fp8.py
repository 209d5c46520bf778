"""Casts to FP8 with dynamic scales, and products of what they give (``train.matmul=fp8``).

A matrix is multiplied by a scale that brings its largest magnitude near the largest FP8 value, and a product is divided by
the scales of both operands. Scales are powers of two, as in torchao's recipes for scales of rows: within the dtype's normal
range the rounding does not depend on them, so ranks that hold parts of a matrix, and the matrix and its transpose, have the
same FP8 values. A scale is that of what a rank holds: no collective.

Hopper's FP8 products take operands that are contiguous along the dimension that is summed, so gradients need transposes:
the cast writes both in one pass. Tokens are summed in the gradient of a weight: the transpose is padded with zeros to
MULTIPLE of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_tp.distributed.collectives import operator

VALUES = torch.float8_e4m3fn
"""Of activations and weights."""
GRADIENTS = torch.float8_e5m2
"""Of gradients."""
PER_ROW = False
"""A scale for each row (of the transpose: for each column) rather than one for the matrix."""
FUSED_CAST = True
"""On a GPU, one Triton kernel casts and transposes; False leaves both to torch and its compiler."""
TILE, WARPS = (64, 64), 4
"""Rows and columns of what a program of the kernel casts, and its warps."""
MULTIPLE = 16
"""What dimensions of an FP8 product must be multiples of."""
SMALLEST = 1e-30
"""A largest magnitude below this counts as this: its scale remains finite."""


class Scales(NamedTuple):
    """What a matrix is multiplied by before its cast, and a product after it: fp32, 0-d or, with PER_ROW, [R]."""

    scale: Tensor
    inverse: Tensor


class Cast(NamedTuple):
    """FP8 values of a matrix [M, K]: ``rows`` [M, K] and their transpose ``columns`` [K, M padded], which is empty, as
    ``rows`` may be, where it was not asked for; and the inverses of their scales."""

    rows: Tensor
    columns: Tensor
    row_inverse: Tensor
    column_inverse: Tensor


def scales(largest: Tensor, dtype: torch.dtype) -> Scales:
    """The scales for a ``largest`` magnitude (any shape and dtype; NaN if there is one among them).

    A magnitude that is not finite makes the inverse NaN, and so every product of the matrix, since an FP8 value of a cast
    that saturates would hide it.
    """
    largest = largest.float()
    exact = torch.finfo(dtype).max / largest.clamp(min=SMALLEST)
    scale = (exact.view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two below
    return Scales(scale, torch.where(largest.isfinite(), 1 / scale, torch.nan))


def largest_of(parts: Sequence[Tensor], *, columns: bool = False, per_row: bool | None = None) -> Tensor:
    """The largest magnitude of a matrix [M, K], given as ``parts`` [M, columns of the part]: 0-d, or with ``per_row`` [M]
    or, of its ``columns``, [K]."""
    per_row = PER_ROW if per_row is None else per_row
    if per_row and columns:
        return torch.cat([_magnitude(part, 0) for part in parts])
    # of each row first: the compiler adds that to the kernel that writes the row
    rows = _magnitude(parts[0], 1)
    for part in parts[1:]:
        rows = torch.maximum(rows, _magnitude(part, 1))
    return rows if per_row else rows.amax()


def _magnitude(part: Tensor, dim: int) -> Tensor:
    """The largest along ``dim``; NaN where there is one. One pass over memory, compiled or not."""
    return torch.linalg.vector_norm(part, torch.inf, dim=dim)  # type: ignore[no-any-return]


def padded(rows: int) -> int:
    """``rows``, or the next multiple of MULTIPLE."""
    return (rows + MULTIPLE - 1) // MULTIPLE * MULTIPLE


@operator(
    "fp8_cast(Tensor[] parts, Tensor row_scales, Tensor column_scales, ScalarType dtype, bool rows, bool columns)"
    " -> (Tensor, Tensor)"
)
def fp8_cast(
    parts: list[Tensor], row_scales: Tensor, column_scales: Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    """The matrix [M, K] of ``parts`` [M, columns of the part] times its scales, in ``dtype``: [M, K] if ``rows``, and its
    transpose [K, M padded] if ``columns``; else [0]. Scales fp32: 0-d, or [M] and [K]. Local."""
    size, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    out = parts[0].new_empty((size, width) if rows else (0,), dtype=dtype)
    transposed = parts[0].new_empty((width, padded(size)) if columns else (0,), dtype=dtype)
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        here = column_scales[start:stop] if column_scales.ndim else column_scales
        launch = _launch if part.is_cuda and FUSED_CAST else _cast_by_torch
        launch(
            part, row_scales, here, out[:, start:stop] if rows else None, transposed[start:stop] if columns else None
        )
        start = stop
    return out, transposed


@torch.library.register_fake("apollo_tp::fp8_cast")
def _(
    parts: list[Tensor], _row_scales: Tensor, _column_scales: Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    size, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    out = parts[0].new_empty((size, width) if rows else (0,), dtype=dtype)
    return out, parts[0].new_empty((width, padded(size)) if columns else (0,), dtype=dtype)


def _launch(
    part: Tensor, row_scales: Tensor, column_scales: Tensor, out: Tensor | None, transposed: Tensor | None
) -> None:
    """As ``_cast_by_torch``, by one kernel."""
    import triton

    from apollo_tp.model.fp8_kernels import cast_kernel  # here: a CPU build of torch may have no Triton

    some = out if transposed is None else transposed
    assert some is not None, "a cast to nothing"
    part = part if part.stride(1) == 1 else part.contiguous()
    (rows, columns), (block_m, block_k) = part.shape, TILE
    grid = (triton.cdiv(columns, block_k), triton.cdiv(rows, block_m))
    first, second = (some if matrix is None else matrix for matrix in (out, transposed))
    cast_kernel[grid](
        part, part.stride(0), row_scales, column_scales, first, first.stride(0), second, second.stride(0),
        rows, padded(rows), columns, LIMIT=torch.finfo(some.dtype).max, PER_ROW=row_scales.ndim > 0,
        ROWS=out is not None, COLUMNS=transposed is not None, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=WARPS,
    )  # fmt: skip


def _cast_by_torch(
    part: Tensor, row_scales: Tensor, column_scales: Tensor, out: Tensor | None, transposed: Tensor | None
) -> None:
    """Write ``part`` [M, K] times its scales to ``out`` [M, K] and ``transposed`` [K, M padded], where they are."""
    if out is not None:
        out.copy_(_saturated(part.float() * row_scales[..., None], out.dtype))
    if transposed is not None:
        values = _saturated(part.float() * column_scales, transposed.dtype)
        transposed.copy_(torch.nn.functional.pad(values.T.float(), (0, transposed.shape[1] - part.shape[0])))


def _saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def multiply(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, *, fast: bool, out: Tensor | None = None
) -> Tensor:
    """``a @ b.T`` divided by the scales, in bf16: [m, n] of FP8 ``a`` [m, k] and ``b`` [n, k], both contiguous.

    Inverse scales fp32 0-d, or [m] and [n]. ``fast`` adds products up as Hopper's tensor cores do by themselves, with 14 bits
    or so, rather than in fp32 every so often: for results that nothing is summed from over many steps. Written to ``out``
    where given. Local.
    """
    if a_inverse.ndim:
        a_inverse, b_inverse = a_inverse[:, None], b_inverse[None, :]
    b = b.t()
    kwargs = {"scale_a": a_inverse, "scale_b": b_inverse, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
    if out is None:
        return torch._scaled_mm(a, b, **kwargs)
    return torch._scaled_mm(a, b, **kwargs, out=out)
