"""Writing an fp32 result into bf16 weights that have no fp32 master copy.

``remainder``: the weight is an fp32 number cut to 24 bits; its upper 16, rounded to nearest, are the served bf16 and the
signed rest is one int8 of optimizer state. Pure integer arithmetic, deterministic, no random numbers, so it cannot
depend on the number of ranks. Same idea as FlashOptim (arXiv 2602.23349), but exact in the integer domain instead of in
fractions of an ulp. ``remainder16``: the same with all 32 bits and an int16, so that nothing is lost. ``stochastic``:
Philox bits addressed by (parameter, step, global row, global column): no memory, unbiased, the same for any sharding.
``nearest``: what a plain cast does; loses most of a small update.

fp32 weights are written exactly whatever the precision says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_tp.config import Precision, PrecisionChoice
from apollo_tp.optim.projection import philox4x32

LANES = 8
"""16-bit random numbers per Philox call."""
_NAN = 0x7FC00000


LEAST_RATE_OF_INT8 = 3e-6
"""Learning rate from which an int8 remainder keeps all of 200 updates, as ``benchmarks/bench_rounding.py`` measures it: 95 %
at 1e-6, 55 % at 3e-7. What is less than half a unit of 24 bits is lost."""


def choose(choice: PrecisionChoice, learning_rate: float) -> tuple[Precision, str]:
    """The precision that ``train.precision`` asks for, and a sentence about it for the log; "" if there is no choice."""
    if choice is not PrecisionChoice.auto:
        return Precision(choice.value), ""
    if learning_rate >= LEAST_RATE_OF_INT8:
        return Precision.remainder, (
            f"train.precision=auto: an int8 remainder (1 byte per weight), since optim.lr={learning_rate:g} is not below "
            f"{LEAST_RATE_OF_INT8:g}; steps far below that lose a part of each update (train.precision=remainder16 does not)"
        )
    return Precision.remainder16, (
        f"train.precision=auto: an int16 remainder (2 bytes per weight), since an int8 loses a part of each update below a "
        f"learning rate of {LEAST_RATE_OF_INT8:g}, and optim.lr is {learning_rate:g}; train.precision=remainder takes half"
    )


def remainder_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype | None:
    """The dtype of the remainders that weights of ``dtype`` keep; None if they keep none."""
    kinds = {Precision.remainder: torch.int8, Precision.remainder16: torch.int16}
    return kinds.get(precision) if dtype is torch.bfloat16 else None


def convert_remainder(remainder: Tensor, dtype: torch.dtype) -> Tensor:
    """An int8 ``remainder`` as int16, with the same value of the weight, or an int16 one as the nearest int8."""
    if remainder.dtype is dtype:
        return remainder
    if dtype is torch.int16:
        return remainder.to(torch.int16) << 8
    return ((remainder.to(torch.int32) + 0x80) >> 8).clamp(max=127).to(torch.int8)


def join(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """The fp32 value of ``weight`` (bf16 or fp32, any shape) and its int8 or int16 ``remainder``; a new tensor."""
    if remainder is None:
        return weight.to(torch.float32, copy=True)
    upper = weight.contiguous().view(torch.int16).to(torch.int32)
    if remainder.dtype is torch.int16:
        return ((upper << 16) + remainder).view(torch.float32)
    return (((upper << 8) + remainder) << 8).view(torch.float32)


def split(value: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 nearest with ties away from zero, remainder of ``dtype``); ``join`` of it is ``value``, to 24 bits with
    int8 and exactly with int16 (but for payloads of NaN)."""
    if dtype is torch.int16:
        bits = _bits(value)
        upper = (bits + 0x8000) >> 16
        return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)
    bits = (_bits(value) + 0x80) >> 8
    upper = (bits + 0x80) >> 8
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 8)).to(torch.int8)


def _bits(value: Tensor) -> Tensor:
    """The int32 bits of fp32 ``value``, of the same shape. Any NaN has those of torch's: with a payload near the largest
    one, rounding up would run over into the sign, and give minus zero."""
    return torch.where(value.isnan(), _NAN, value.contiguous().view(torch.int32))


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
        upper, rest = split(value, remainder.dtype)
        weight.copy_(upper)
        remainder.copy_(rest)
    elif bits is not None and weight.dtype is torch.bfloat16:
        weight.copy_(stochastic(value, bits))
    else:
        weight.copy_(value)
