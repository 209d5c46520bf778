"""The casts of ``fp8`` in Triton: of a matrix's rows with scales of their own in one pass, or of both layouts in one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_bits(x):
    """The bits of the magnitudes of bf16 ``x``, int32: in their order, infinities and then NaN after all numbers."""
    return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def held(value, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(value, -LIMIT), LIMIT)


@triton.jit
def cast_rows_kernel(
    x, x_stride, out, inverse, largest, K, LIMIT: tl.constexpr, TOP: tl.constexpr, MAX_SHIFT: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of bf16 ``x`` [M, K] in FP8 to ``out`` [M, K], contiguous; the inverse of its scale, as ``fp8.scales`` has
    it, and its largest magnitude to fp32 [M]. TOP: ``fp8.TOP`` of the dtype. WHOLE: a BLOCK is a row, which is read once."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * x_stride
    out += row.to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    if WHOLE:
        values = tl.load(x + k, mask=k < K, other=0.0)
        bits = tl.max(largest_bits(values), 0)
    else:
        found = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            found = tl.maximum(found, largest_bits(tl.load(x + start + k, mask=start + k < K, other=0.0)))
        bits = tl.max(found, 0)
    shift = TOP - ((bits >> 7) - 127) - ((bits & 0x7F) > 0x60).to(tl.int32)
    shift = tl.minimum(shift, MAX_SHIFT)
    scale = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    back = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    tl.store(inverse + row, tl.where(bits < 0x7F80, back, float("nan")))
    tl.store(largest + row, (bits << 16).to(tl.float32, bitcast=True))
    if WHOLE:
        tl.store(out + k, held(values.to(tl.float32) * scale, LIMIT).to(out.dtype.element_ty), mask=k < K)
    else:
        for start in range(0, K, BLOCK):
            values = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            tl.store(out + start + k, held(values * scale, LIMIT).to(out.dtype.element_ty), mask=start + k < K)


@triton.jit
def cast_kernel(
    x, x_stride, row_scales, scale, out, out_stride, transposed, transposed_stride, M, M_PADDED, K,
    LIMIT: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write ``x`` [M, K] times ``row_scales`` (fp32: [M] with PER_ROW 1, one with 0) to ``out`` [M, K] (ROWS), and times
    ``scale`` (fp32, one) to ``transposed`` [K, M_PADDED] (COLUMNS), whose columns from M on become 0. Strides are those of
    the first dimension. Values are held to +-LIMIT, the largest of the FP8 dtype. A NaN may become anything: see
    ``fp8.scales``.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    m64, k64 = m.to(tl.int64), k.to(tl.int64)
    tile = tl.load(x + m64[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROWS:
        scaled = tile * tl.load(row_scales + m * PER_ROW, mask=m < M, other=0.0)[:, None]
        values = held(scaled, LIMIT).to(out.dtype.element_ty)
        tl.store(out + m64[:, None] * out_stride + k[None, :], values, mask=inside)
    if COLUMNS:
        turned = tl.trans(held(tile * tl.load(scale), LIMIT).to(transposed.dtype.element_ty))
        within = (k < K)[:, None] & (m < M_PADDED)[None, :]
        tl.store(transposed + k64[:, None] * transposed_stride + m[None, :], turned, mask=within)
