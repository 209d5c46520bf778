"""Sums of two ranks through each other's memory, in place of NCCL: each reads what the other has and adds.

Two GPUs of one host that reach each other's memory need one read of the other's tensor per sum, which is as many bytes as a
ring all-reduce sends, without its steps: torch's symmetric memory maps it. With more ranks a ring sends fewer bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import _SymmetricMemory

log = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Smaller sums are left to NCCL."""


class PeerSums:
    """Memory of two ranks that both can read, in two halves which take turns: while the other rank may still read one, the
    next sum goes to the other, so that one barrier a sum is enough."""

    def __init__(self, rank: int, group: dist.ProcessGroup, num_bytes: int) -> None:
        """Collective: maps 2 x ``num_bytes`` of each rank into the other. Raises RuntimeError where that is impossible."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self.num_bytes = num_bytes
        device = torch.device("cuda", torch.cuda.current_device())
        memory = symmetric_memory.empty(2 * num_bytes, dtype=torch.uint8, device=device)
        self._handle: _SymmetricMemory = symmetric_memory.rendezvous(memory, group)
        other = self._handle.get_buffer(1 - rank, (2 * num_bytes,), torch.uint8)
        self._halves = [(memory[:num_bytes], other[:num_bytes]), (memory[num_bytes:], other[num_bytes:])]
        self._copies = torch.cuda.Stream(device)
        self._turn = 0

    def stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where to put a tensor that is to be summed, and the other rank's."""
        self._turn ^= 1
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        mine, other = (half[:num_bytes].view(dtype).view(shape) for half in self._halves[self._turn])
        return mine, other

    def add(self, mine: Tensor, other: Tensor) -> Tensor:
        """The sum of a staged tensor over both ranks."""
        self._handle.barrier(channel=0)
        return mine + other

    def add_beside(self, mine: Tensor, other: Tensor, work: Callable[[], None]) -> Tensor:
        """The same, with what ``work`` launches running while the other rank's tensor is copied here (by a copy engine: a
        kernel would take the multiprocessors from it)."""
        current = torch.cuda.current_stream()
        self._copies.wait_stream(current)
        copy = torch.empty_like(mine)
        with torch.cuda.stream(self._copies):
            self._handle.barrier(channel=1)
            copy.copy_(other, non_blocking=True)
        work()
        current.wait_stream(self._copies)
        return mine + copy
