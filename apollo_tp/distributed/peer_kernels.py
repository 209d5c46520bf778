"""The Triton kernels of a sum over two ranks: a barrier, and one pass over what is added, the other rank's part of it and a
residual. And one that reads a word of the host's memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
LANES = 4
"""Consecutive programs work in this many regions of the tensors, so that memory and link are busy all the time."""


SPINS = 256
"""Tries of a barrier between two looks at the host's memory."""


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


@triton.jit
def barrier_kernel(
    mine,  # int32, one element: 1 once the other rank is here
    theirs,  # the same of the other rank, in its memory
    aborted,  # int32, one element of the host's memory: nobody waits any longer if it is not 0
    intact,  # fp32, one element: set to 0 if this barrier is aborted
    SPINS: tl.constexpr,  # tries between two looks at ``aborted``, which take a microsecond each
):
    """Tell the other rank, and wait for it. Its writes before its barrier are seen after this one."""
    over = tl.zeros((), tl.int32)
    tries = tl.zeros((), tl.int32)
    seen = tl.atomic_cas(theirs, 0, 1, sem="acq_rel", scope="sys")  # it is 0 once the last signal was taken
    while (seen != 0) & (over == 0):
        seen = tl.atomic_cas(theirs, 0, 1, sem="acq_rel", scope="sys")
        tries += 1
        if tries % SPINS == 0:
            over = tl.load(aborted, volatile=True)
    came = tl.atomic_cas(mine, 1, 0, sem="acq_rel", scope="sys")
    while (came != 1) & (over == 0):
        came = tl.atomic_cas(mine, 1, 0, sem="acq_rel", scope="sys")
        tries += 1
        if tries % SPINS == 0:
            over = tl.load(aborted, volatile=True)
    if over != 0:
        tl.store(intact, 0.0)


@triton.jit
def read_kernel(word, out):
    """``out`` = ``word``, one fp32 element each; ``word`` is the host's."""
    tl.store(out, tl.load(word, volatile=True))


def read(word: Tensor, device: torch.device) -> Tensor:
    """What pinned ``word`` (fp32 [1]) is when the device comes to this in the current stream: fp32 [1] on ``device``. A copy
    may be taken earlier, since nobody must change its source meanwhile."""
    out = torch.empty(1, device=device)
    read_kernel[(1,)](word, out, num_warps=1)
    return out


def barrier(mine: Tensor, theirs: Tensor, aborted: Tensor, intact: Tensor) -> None:
    """Launch ``barrier_kernel``: ``mine``, ``theirs`` and ``aborted`` int32, ``intact`` fp32, one element each."""
    barrier_kernel[(1,)](mine, theirs, aborted, intact, SPINS=SPINS, num_warps=1)


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
