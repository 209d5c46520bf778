"""The Triton kernel of a sum over two ranks: one pass over what is added, the other rank's part of it and a residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
LANES = 4
"""Consecutive programs work in this many regions of the tensors, so that memory and link are busy all the time."""


@triton.jit
def add_kernel(
    mine,
    near,
    far,
    residual,
    out,
    num_near,
    count,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """out = round(round(mine + theirs) + residual), elementwise; additions in fp32. ``theirs`` is ``near`` in the first
    ``num_near`` elements, a multiple of BLOCK, and ``far`` after them."""
    lane = tl.program_id(0) % LANES
    start = (lane * (tl.num_programs(0) // LANES) + tl.program_id(0) // LANES).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < count
    total = tl.load(mine + index, inside).to(tl.float32)
    if start < num_near:
        total += tl.load(near + index, inside).to(tl.float32)
    else:
        total += tl.load(far + index, inside).to(tl.float32)
    if HAS_RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + index, inside).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), inside)


def add(mine: Tensor, near: Tensor, far: Tensor, residual: Tensor | None) -> Tensor:
    """``(mine + theirs) + residual`` as two operators would round it: contiguous [m, n] of one dtype, on one device.

    ``theirs`` is ``near`` [k, n] in the first k rows and ``far`` [m, n] in the others; k * n is a multiple of BLOCK.
    """
    assert near.numel() % BLOCK == 0, "a program reads one of the two"
    out = torch.empty_like(mine)
    programs_per_lane = triton.cdiv(mine.numel(), LANES * BLOCK)
    add_kernel[(LANES * programs_per_lane,)](
        mine, near, far, mine if residual is None else residual, out, near.numel(), mine.numel(),
        HAS_RESIDUAL=residual is not None, BLOCK=BLOCK, LANES=LANES, num_warps=8,
    )  # fmt: skip
    return out
