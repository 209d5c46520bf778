"""``fp8.cast`` in Triton: one pass over a matrix writes its FP8 values and their transpose."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cast_kernel(
    x, x_stride, row_scales, column_scales, out, out_stride, transposed, transposed_stride, M, M_PADDED, K,
    LIMIT: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write ``x`` [M, K] times its scales to ``out`` [M, K] (ROWS) and ``transposed`` [K, M_PADDED] (COLUMNS), whose columns
    from M on become 0. Strides are those of the first dimension. Scales fp32: one each, or PER_ROW [M] and [K].

    Values are held to +-LIMIT, the largest of the FP8 dtype, and a NaN may become anything: see ``fp8.scales``.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    m64, k64 = m.to(tl.int64), k.to(tl.int64)
    tile = tl.load(x + m64[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if PER_ROW:
        if ROWS:
            scaled = tile * tl.load(row_scales + m, mask=m < M, other=0.0)[:, None]
            scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT).to(out.dtype.element_ty)
            tl.store(out + m64[:, None] * out_stride + k[None, :], scaled, mask=inside)
        if COLUMNS:
            scaled = tile * tl.load(column_scales + k, mask=k < K, other=0.0)[None, :]
            scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT).to(transposed.dtype.element_ty)
            within = (k < K)[:, None] & (m < M_PADDED)[None, :]
            tl.store(transposed + k64[:, None] * transposed_stride + m[None, :], tl.trans(scaled), mask=within)
    else:
        scaled = tile * tl.load(row_scales)
        scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT).to(out.dtype.element_ty)
        if ROWS:
            tl.store(out + m64[:, None] * out_stride + k[None, :], scaled, mask=inside)
        if COLUMNS:
            within = (k < K)[:, None] & (m < M_PADDED)[None, :]
            tl.store(transposed + k64[:, None] * transposed_stride + m[None, :], tl.trans(scaled), mask=within)
