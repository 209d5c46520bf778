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
MAX_BLOCKS = 4
MIN_BLOCK_ROWS = 1024
"""A product is made in up to so many blocks of at least so many rows: what is left to wait for is the copy of the last."""


def reach_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether both ranks of ``group`` (NCCL) can read the other's GPU, on the same host. One all-gather, one all-reduce."""
    uuid = torch.tensor(list(_uuid(device)), dtype=torch.uint8, device=device)
    uuids = uuid.new_empty(2 * len(uuid))
    dist.all_gather_into_tensor(uuids, uuid, group=group)
    found = {bytes(half) for half in uuids.view(2, -1).tolist()}
    visible = range(torch.cuda.device_count())
    other = [i for i in visible if _uuid(i) in found - {_uuid(device)}]
    reached = uuid.new_tensor([bool(other) and torch.cuda.can_device_access_peer(device, other[0])])
    dist.all_reduce(reached, op=dist.ReduceOp.MIN, group=group)
    if not reached.item():
        log.info("sums over ranks go through NCCL: the two GPUs do not reach each other's memory")
    return bool(reached.item())


def _uuid(device: torch.device | int) -> bytes:
    return str(torch.cuda.get_device_properties(device).uuid).encode()


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

    def summed_product(self, a: Tensor, b: Tensor, beside: Callable[[], None] | None) -> Tensor:
        """``a @ b`` [m, n] of at most num_bytes, summed over both ranks; what ``beside`` launches runs meanwhile, if given.

        A copy engine reads the other rank's product, since a kernel would take multiprocessors from what runs meanwhile.
        Without ``beside`` that is the next block of rows of the same product.
        """
        main = torch.cuda.current_stream()
        mine, other = self._next_half(a.shape[0], b.shape[1], a.dtype)
        blocks = 1 if beside is not None else max(1, min(MAX_BLOCKS, a.shape[0] // MIN_BLOCK_ROWS))
        copy, out = torch.empty_like(mine), torch.empty_like(mine)
        copied = []
        for part_of_a, *to in zip(*(t.chunk(blocks) for t in (a, mine, other, copy)), strict=True):
            torch.mm(part_of_a, b, out=to[0])
            self._copies.wait_stream(main)
            with torch.cuda.stream(self._copies):
                self._handle.barrier(channel=0)
                to[2].copy_(to[1], non_blocking=True)
                copied.append(self._copies.record_event())
        if beside is not None:
            beside()
        for event, *parts in zip(copied, *(t.chunk(blocks) for t in (mine, copy, out)), strict=True):
            main.wait_event(event)
            torch.add(parts[0], parts[1], out=parts[2])
        return out

    def _next_half(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where to put a matrix that is to be summed, and where the other rank's is."""
        self._turn ^= 1
        num_bytes = dtype.itemsize * rows * columns
        mine, other = (half[:num_bytes].view(dtype).view(rows, columns) for half in self._halves[self._turn])
        return mine, other
