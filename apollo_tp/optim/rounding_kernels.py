"""``rounding`` in Triton: from a served weight and its remainder to fp32 and back; bits of stochastic rounding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_bits(entry, row, column, column0, step, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """16-bit numbers of ``rounding.random_bits`` for local ``row`` and ``column`` of a piece; (BLOCK_R, BLOCK_N).

    EVEN: the global column of ``column0`` is a multiple of 8, so that one Philox call serves eight neighbours.
    """
    key = tl.load(entry + 14).to(tl.uint64, bitcast=True)
    c1 = (row + tl.load(entry + 12)).to(tl.uint32)[:, None]
    first = tl.load(entry + 13)
    if EVEN:
        c0 = ((first + column0) // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
        c0 = tl.broadcast_to(c0, (BLOCK_R, BLOCK_N // 8))
    else:
        c0 = tl.broadcast_to(((first + column) // 8).to(tl.uint32)[None, :], (BLOCK_R, BLOCK_N))
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(key, c0, zero + c1, zero + step.to(tl.uint32), zero)
    if EVEN:
        even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
        odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
        bits = tl.interleave(even, odd)
    else:
        lane = ((first + column) % 8)[None, :]
        word = tl.where(lane < 2, w0, tl.where(lane < 4, w1, tl.where(lane < 6, w2, w3)))
        bits = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)
    return bits.to(tl.int32)


@triton.jit
def join(weight, rest, REMAINDER: tl.constexpr):
    """fp32 value of a weight and its remainder of so many bits (0: none), as ``rounding.join``."""
    if REMAINDER == 8:
        bits = ((weight.to(tl.int16, bitcast=True).to(tl.int32) << 8) + rest.to(tl.int32)) << 8
        return bits.to(tl.float32, bitcast=True)
    elif REMAINDER == 16:
        bits = (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + rest.to(tl.int32)
        return bits.to(tl.float32, bitcast=True)
    else:
        return weight.to(tl.float32)


@triton.jit
def store(w_pointers, rest_pointers, value, random, inside, REMAINDER: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Write fp32 ``value`` as ``rounding.store``."""
    # any NaN as torch's: adding to a larger payload would run over into the sign
    exact = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    if REMAINDER == 16:
        upper = (exact + 0x8000) >> 16
        tl.store(rest_pointers, (exact - (upper << 16)).to(tl.int16), mask=inside)
        tl.store(w_pointers, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    elif REMAINDER == 8:
        bits = (exact + 0x80) >> 8
        upper = (bits + 0x80) >> 8
        tl.store(rest_pointers, (bits - (upper << 8)).to(tl.int8), mask=inside)
        tl.store(w_pointers, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    elif STOCHASTIC:
        raised = (exact + random) >> 16
        tl.store(w_pointers, raised.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    elif w_pointers.dtype.element_ty == tl.bfloat16:
        # nearest even, spelled out: the interpreter's own cast cuts off
        bits = (exact + 0x7FFF + ((exact >> 16) & 1)) >> 16
        tl.store(w_pointers, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(w_pointers, value, mask=inside)
