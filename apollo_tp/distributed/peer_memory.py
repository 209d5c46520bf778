"""Sums of two ranks through each other's memory, in place of NCCL: each reads what the other has and adds.

Two GPUs of one host that reach each other's memory need one read of the other's tensor per sum, which is as many bytes as a
ring all-reduce sends, without its steps: torch's symmetric memory maps it. With more ranks a ring sends fewer bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import _SymmetricMemory

log = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Smaller sums are left to NCCL."""
FIRST_ROWS = 256
"""Rows of a product that is summed in two blocks: the first has a multiple of these."""


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


def add_products(pairs: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
    """The sum of ``a @ b`` over ``pairs``, into ``out``."""
    for position, (a, b) in enumerate(pairs):
        if position == 0:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    return out


def first_rows(rows: int, contracted: int, columns: int) -> int:
    """How many rows of a product [rows, contracted] @ [contracted, columns] to copy while the others are multiplied: as
    many as that leaves time for, and none of a small product or one that the adding kernel cannot divide."""
    quarters = 3 if contracted >= columns else 2
    return 0 if columns % 16 else rows * quarters // (4 * FIRST_ROWS) * FIRST_ROWS


def _uuid(device: torch.device | int) -> bytes:
    return str(torch.cuda.get_device_properties(device).uuid).encode()


class PeerSums:
    """Memory of two ranks that both can read, in two halves which take turns: while the other rank may still read one, the
    next sum goes to the other, so that one barrier a sum is enough.

    The barriers are kernels that wait without a deadline, since one that gave up would end the CUDA context, and under MPS
    perhaps the server's too. A rank whose peer is gone is left to NCCL's timeout of the collective that every step has.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup, num_bytes: int) -> None:
        """Collective: maps 2 x ``num_bytes`` of each rank into the other. Raises RuntimeError where that is impossible."""
        import torch.distributed._symmetric_memory as symmetric_memory

        from apollo_tp.distributed.peer_kernels import add

        self._add = add
        self.num_bytes = num_bytes
        device = torch.device("cuda", torch.cuda.current_device())
        memory = symmetric_memory.empty(2 * num_bytes, dtype=torch.uint8, device=device)
        self._handle: _SymmetricMemory = symmetric_memory.rendezvous(memory, group)
        other = self._handle.get_buffer(1 - rank, (2 * num_bytes,), torch.uint8)
        self._halves = [(memory[:num_bytes], other[:num_bytes]), (memory[num_bytes:], other[num_bytes:])]
        self._copies = torch.cuda.Stream(device, priority=-1)  # its barriers need not wait for a product's last blocks
        self._turn = 0

    def summed_products(
        self, pairs: Sequence[tuple[Tensor, Tensor]], beside: Callable[[], None] | None, residual: Tensor | None = None
    ) -> Tensor:
        """The sum of ``a @ b`` [m, n] over ``pairs`` and both ranks, of at most num_bytes; either plus ``residual``
        [m, n], or while what ``beside`` launches runs.

        Beside other work a copy engine reads the other rank's product: a kernel would take multiprocessors from that work.
        """
        (a, b), *_ = pairs
        mine, other = self._next_half(a.shape[0], b.shape[1], a.dtype)
        if beside is None:
            return self._sum_in_blocks(pairs, mine, other, residual)
        add_products(pairs, mine)
        copy = torch.empty_like(mine)
        self._copy_aside(other, copy)
        beside()
        torch.cuda.current_stream().wait_stream(self._copies)
        return mine.add(copy)

    def _sum_in_blocks(
        self, pairs: Sequence[tuple[Tensor, Tensor]], mine: Tensor, other: Tensor, residual: Tensor | None
    ) -> Tensor:
        """In work that is recorded the first rows are copied from the other rank while the others are multiplied. Else it
        would not pay: the host has about five calls more to launch."""
        rows, columns = mine.shape
        first = first_rows(rows, pairs[0][0].shape[1], columns) if torch.cuda.is_current_stream_capturing() else 0
        copy = torch.empty_like(mine[:first])
        if first:
            add_products([(a[:first], b) for a, b in pairs], mine[:first])
            self._copy_aside(other[:first], copy)
        add_products([(a[first:], b) for a, b in pairs], mine[first:])
        self._handle.barrier(channel=0)
        if first:
            torch.cuda.current_stream().wait_stream(self._copies)
        elif residual is None:
            return mine + other
        return self._add(mine, copy, other, None if residual is None else residual.contiguous())

    def _copy_aside(self, other: Tensor, copy: Tensor) -> None:
        """Once both ranks have come here, ``other`` goes to ``copy``, beside what is launched next."""
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self._handle.barrier(channel=1)
            copy.copy_(other, non_blocking=True)

    def settle(self) -> None:
        """Until both ranks are here nobody goes on: then neither reads the other's memory any more."""
        self._handle.barrier(channel=2)

    def restart(self) -> None:
        """After work that either rank may have broken off: both begin with the same half again. Collective."""
        self.settle()
        self._turn = 0

    def _next_half(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where to put a matrix that is to be summed, and where the other rank's is."""
        self._turn ^= 1
        num_bytes = dtype.itemsize * rows * columns
        mine, other = (half[:num_bytes].view(dtype).view(rows, columns) for half in self._halves[self._turn])
        return mine, other
