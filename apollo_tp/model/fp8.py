"""Casts to FP8 with dynamic scales (``train.matmul=fp8``).

A matrix is multiplied by a scale that brings its largest magnitude near the largest FP8 value, and a product by the inverses
of both scales. Scales are powers of two, as in torchao's recipes for scales of rows: within the dtype's normal range the
rounding does not depend on them, so that a matrix and its transpose, or the parts of it that ranks hold, have the same FP8
values. A scale is of what a rank holds: no collective.

Hopper's FP8 products take operands that are contiguous along the dimension that is summed, so gradients need transposes. The
rows of a matrix have a scale each (PER_ROW), which costs no pass over memory of its own; its transpose has one scale, since
scales of columns would. Tokens are summed in the gradient of a weight: the transpose is padded to a MULTIPLE of them.
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
TOP = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
"""The largest value of a dtype is 1.75 times two to the power of this."""
PER_ROW = True
"""Of the rows of a matrix: a scale each, rather than one for the matrix."""
FUSED_CAST = True
"""On a GPU, Triton kernels cast and transpose; False leaves both to torch."""
TILE, WARPS = (64, 64), 4
"""Rows and columns of what a program of ``cast_kernel`` casts, and its warps."""
MAX_BLOCK = 16384
"""A longer row is read twice by ``cast_rows_kernel``."""
MULTIPLE = 16
"""What dimensions of an FP8 product must be multiples of."""
MAX_SHIFT = 100
"""The largest exponent of a scale. What is smaller than its inverse becomes 0, rather than the product of two inverses."""


class Scales(NamedTuple):
    """What a matrix is multiplied by before its cast, and a product after it: fp32 [M] for each row, or 0-d."""

    scale: Tensor
    inverse: Tensor


class Cast(NamedTuple):
    """FP8 values of a matrix [M, K]: ``rows`` [M, K], of which the inverses of scales are ``row_inverse``, [M] or 0-d, and
    their transpose ``columns`` [K, M padded] with one ``inverse``, 0-d."""

    rows: Tensor
    columns: Tensor
    row_inverse: Tensor
    inverse: Tensor


def scales(largest: Tensor, dtype: torch.dtype) -> Scales:
    """The scales for ``largest`` magnitudes (any shape and dtype; NaN if there is one among them).

    A magnitude that is not finite makes the inverse NaN, and so every product of the matrix: FP8 values, which saturate,
    would hide it.
    """
    bits = largest.float().view(torch.int32)
    shift = TOP[dtype] - ((bits >> 23) - 127) - ((bits & 0x7FFFFF) > 0x600000).int()
    shift = shift.clamp(max=MAX_SHIFT)
    scale, inverse = (((exponent + 127) << 23).view(torch.float32) for exponent in (shift, -shift))
    return Scales(scale, torch.where(largest.isfinite(), inverse, torch.nan))


def largest_of_rows(parts: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each row of a matrix [M, K], given as ``parts`` [M, columns of the part]: [M]; NaN where
    there is one. The compiler adds this to the kernel that writes the rows."""
    found = torch.linalg.vector_norm(parts[0], torch.inf, dim=1)
    for part in parts[1:]:
        found = torch.maximum(found, torch.linalg.vector_norm(part, torch.inf, dim=1))
    return found  # type: ignore[no-any-return]


def padded(rows: int) -> int:
    """``rows``, or the next multiple of MULTIPLE."""
    return (rows + MULTIPLE - 1) // MULTIPLE * MULTIPLE


@operator("fp8_cast_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor, Tensor)")
def fp8_cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bf16 ``x`` [M, K], each by its own scale: in ``dtype`` [M, K], the inverses of their scales and their largest
    magnitudes, fp32 [M]. Local, one pass over memory."""
    if not (x.is_cuda and FUSED_CAST):
        largest = largest_of_rows([x]).float()
        scale, inverse = scales(largest, dtype)
        return _saturated(x.float() * scale[:, None], dtype), inverse, largest
    import triton

    from apollo_tp.model.fp8_kernels import cast_rows_kernel  # here: a CPU build of torch may have no Triton

    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse, largest = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    block = min(triton.next_power_of_2(x.shape[1]), MAX_BLOCK)
    cast_rows_kernel[(x.shape[0],)](
        x, x.stride(0), out, inverse, largest, x.shape[1], LIMIT=torch.finfo(dtype).max, TOP=TOP[dtype],
        MAX_SHIFT=MAX_SHIFT, WHOLE=block >= x.shape[1], BLOCK=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out, inverse, largest


@torch.library.register_fake("apollo_tp::fp8_cast_rows")
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    inverse, largest = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), inverse, largest


@operator(
    "fp8_cast(Tensor[] parts, Tensor row_scales, Tensor scale, ScalarType dtype, bool rows, bool columns)"
    " -> (Tensor, Tensor)"
)
def fp8_cast(
    parts: list[Tensor], row_scales: Tensor, scale: Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    """The matrix [M, K] of ``parts`` [M, columns of the part] in ``dtype``: times ``row_scales`` (fp32 [M] or 0-d) [M, K],
    if ``rows``; times ``scale`` (fp32 0-d) its transpose [K, M padded], if ``columns``; else [0]. Local."""
    out, transposed = _outputs(parts, dtype, rows, columns)
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        to = (out[:, start:stop] if rows else None, transposed[start:stop] if columns else None)
        launch = _launch if part.is_cuda and FUSED_CAST else _cast_by_torch
        launch(part, row_scales, scale, *to)
        start = stop
    return out, transposed


@torch.library.register_fake("apollo_tp::fp8_cast")
def _(
    parts: list[Tensor], _row_scales: Tensor, _scale: Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(parts, dtype, rows, columns)


def _outputs(parts: Sequence[Tensor], dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    size, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    out = parts[0].new_empty((size, width) if rows else (0,), dtype=dtype)
    return out, parts[0].new_empty((width, padded(size)) if columns else (0,), dtype=dtype)


def _launch(part: Tensor, row_scales: Tensor, scale: Tensor, out: Tensor | None, transposed: Tensor | None) -> None:
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
        part, part.stride(0), row_scales, scale, first, first.stride(0), second, second.stride(0),
        rows, padded(rows), columns, LIMIT=torch.finfo(some.dtype).max, PER_ROW=row_scales.ndim,
        ROWS=out is not None, COLUMNS=transposed is not None, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=WARPS,
    )  # fmt: skip


def _cast_by_torch(
    part: Tensor, row_scales: Tensor, scale: Tensor, out: Tensor | None, transposed: Tensor | None
) -> None:
    """Write ``part`` [M, K] times its scales to ``out`` [M, K] and ``transposed`` [K, M padded], where they are."""
    if out is not None:
        out.copy_(_saturated(part.float() * row_scales[..., None], out.dtype))
    if transposed is not None:
        size = part.shape[0]
        transposed[:, :size].copy_(_saturated(part.float() * scale, transposed.dtype).T)
        transposed[:, size:].zero_()


def _saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` bf16 [M, K] in ``dtype`` [M, K], the inverses of its scales ([M] or 0-d), and its largest magnitude, 0-d."""
    if PER_ROW:
        out, inverse, largest = fp8_cast_rows(x, dtype)
        return out, inverse, largest.amax()
    largest = largest_of_rows([x]).amax()
    scale, inverse = scales(largest, dtype)
    return fp8_cast([x], scale, scale, dtype, True, False)[0], inverse, largest


def cast_columns(x: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The transpose [K, M padded] of ``x`` bf16 [M, K] in ``dtype``, and the inverse of its scale, both of whose 0-d: that
    for the ``largest`` magnitude."""
    scale, inverse = scales(largest, dtype)
    return fp8_cast([x], scale, scale, dtype, False, True)[1], inverse


def cast(parts: Sequence[Tensor], dtype: torch.dtype) -> Cast:
    """Rows and transpose of the matrix bf16 [M, K] of ``parts`` [M, columns of the part] in ``dtype``, in one pass."""
    of_rows = largest_of_rows(parts)
    of_columns = scales(of_rows.amax(), dtype)
    row_scales = scales(of_rows, dtype) if PER_ROW else of_columns
    rows, columns = fp8_cast(list(parts), row_scales.scale, of_columns.scale, dtype, True, True)
    return Cast(rows, columns, row_scales.inverse, of_columns.inverse)
