"""Writing an fp32 result into bf16 weights that have no fp32 master copy.

``remainder``: the weight is an fp32 number cut to 24 bits; its upper 16, rounded to nearest, are the served bf16 and the
signed rest is one int8 of optimizer state. Pure integer arithmetic, deterministic, no random numbers, so it cannot
depend on the number of ranks. Same idea as FlashOptim (arXiv 2602.23349), but exact in the integer domain instead of in
fractions of an ulp. ``stochastic``: Philox bits addressed by (parameter, step, global row, global column): no memory,
unbiased, the same for any sharding. ``nearest``: what a plain cast does; loses most of a small update.

fp32 weights are written exactly whatever the precision says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_tp.config import Precision
from apollo_tp.optim.projection import philox4x32

LANES = 8
"""16-bit random numbers per Philox call."""
_NAN = 0x7FC00000


def needs_remainder(dtype: torch.dtype, precision: Precision) -> bool:
    """True if weights of ``dtype`` keep an int8 remainder."""
    return precision is Precision.remainder and dtype is torch.bfloat16


def join(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """The fp32 value of ``weight`` (bf16 or fp32, any shape) and its int8 ``remainder``; a new tensor."""
    if remainder is None:
        return weight.to(torch.float32, copy=True)
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 8) + remainder
    return (bits << 8).view(torch.float32)


def _bits(value: Tensor) -> Tensor:
    """The int32 bits of fp32 ``value``, of the same shape. Any NaN has those of torch's: with a payload near the largest
    one, rounding up would run over into the sign, and give minus zero."""
    return torch.where(value.isnan(), _NAN, value.contiguous().view(torch.int32))


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 nearest with ties away from zero, int8 remainder); ``join`` of it is ``value`` to 24 bits."""
    bits = (_bits(value) + 0x80) >> 8
    upper = (bits + 0x80) >> 8
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 8)).to(torch.int8)


def random_bits(key: tuple[int, int], step: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Uniform 16-bit integers, int32 [R, C], for global ``rows`` [R] and ``columns`` [C] (int64) at ``step``.

    Lane column % 8 of the Philox call with counter (column // 8, row, step, 0): lane j is the low (even j) or high (odd)
    half of word j // 2.
    """
    if rows.numel() == 0 or columns.numel() == 0:
        return torch.zeros(rows.numel(), columns.numel(), dtype=torch.int32, device=rows.device)
    blocks, position = torch.unique(columns // LANES, return_inverse=True)
    words = philox4x32((blocks[None, :], rows[:, None], step, 0), key)
    halves = [half for word in words for half in (torch.as_tensor(word) & 0xFFFF, torch.as_tensor(word) >> 16)]
    lanes = torch.stack(halves, dim=2).to(torch.int32).flatten(1)
    return lanes[:, position * LANES + columns % LANES]


def stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16 of the same shape, up with probability equal to the fraction of an ulp above; ``bits`` are uniform in
    [0, 2**16)."""
    raised = _bits(value) + bits
    return ((raised >> 16).to(torch.int16)).view(torch.bfloat16)


def store(weight: Tensor, remainder: Tensor | None, value: Tensor, bits: Tensor | None) -> None:
    """Write fp32 ``value`` into ``weight`` in place, by ``remainder`` if given, by ``bits`` if given, else nearest."""
    if remainder is not None:
        upper, rest = split(value)
        weight.copy_(upper)
        remainder.copy_(rest)
    elif bits is not None and weight.dtype is torch.bfloat16:
        weight.copy_(stochastic(value, bits))
    else:
        weight.copy_(value)
