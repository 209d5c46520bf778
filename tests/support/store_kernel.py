"""``rounding_kernels.store`` by itself, on chosen bits: no step leads to most of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_tp.optim.rounding_kernels import store


@triton.jit
def _store_kernel(
    value, weight, rest, random, count, REMAINDER: tl.constexpr, STOCHASTIC: tl.constexpr, N: tl.constexpr
):
    i = tl.arange(0, N)
    inside = i < count
    bits = tl.load(random + i, mask=inside, other=0)
    store(weight + i, rest + i, tl.load(value + i, mask=inside, other=0.0), bits, inside, REMAINDER, STOCHASTIC)


def stored(value: Tensor, random: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """bf16 weights and remainders that the kernel makes of fp32 ``value`` [n] with 16-bit ``random`` int32 [n]."""
    weight = torch.zeros_like(value, dtype=torch.bfloat16)
    rest = torch.zeros_like(value, dtype=torch.int16 if how == "remainder16" else torch.int8)
    count, remainder = value.numel(), {"remainder": 8, "remainder16": 16}.get(how, 0)
    _store_kernel[(1,)](
        value, weight, rest, random, count, remainder, how == "stochastic", triton.next_power_of_2(count)
    )
    return weight, rest
