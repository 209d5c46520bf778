"""Sums over two ranks through each other's memory, in place of NCCL: each rank reads the other's tensor and adds.

Two GPUs of one host that reach each other's memory need one read of the other's tensor for a sum. These are as many bytes
as a ring all-reduce sends, without its steps. torch's symmetric memory maps them. With more ranks a ring sends fewer bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.distributed.products import Product

if TYPE_CHECKING:
    from torch._C._distributed_c10d import _SymmetricMemory

log = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Smaller sums are left to NCCL."""
MAX_SHARE = 0.5
"""Of the free memory that the buffers of both halves may take."""
ALIGNMENT_BYTES = 16
CHANNELS = 3
"""Of barriers: of sums, of copies alongside other work (in another stream), and around captured work."""
PADS_BYTES = ALIGNMENT_BYTES * CHANNELS
"""Behind the two halves: the number that the other rank sets in a barrier, for each of CHANNELS."""
FIRST_ROWS = 256
"""Where a product is summed in two blocks of rows, the first block has a multiple of these."""


@dataclass(eq=False)
class PeerSums:
    """Whether a group sums products through peer memory, and its buffers, which are made when first needed."""

    enabled: bool = True
    """Equal on all ranks."""
    min_buffer_bytes: int = 0
    """Buffers are made for sums of this size at least: set by ``reserve``. Equal on all ranks."""
    buffers: PeerBuffers | None = None
    """Captured work keeps using these."""
    _is_reachable: bool | None = None

    def reserve(
        self, rank: int, size: int, group: dist.ProcessGroup | None, device: torch.device, num_bytes: int
    ) -> None:
        """Make the buffers now, for sums of up to ``num_bytes``, so that they need not grow later, when nothing may be free.
        Collective, as ``buffers_for``."""
        self.min_buffer_bytes = num_bytes
        self.buffers_for(rank, size, group, device, num_bytes)

    def buffers_for(
        self, rank: int, size: int, group: dist.ProcessGroup | None, device: torch.device, num_bytes: int
    ) -> PeerBuffers | None:
        """Buffers for a sum of ``num_bytes`` on ``device`` over ``group`` (NCCL), None where NCCL or gloo do better.

        Collective when it is first called, and when larger buffers are needed.
        """
        if not self.enabled or device.type != "cuda" or size != 2 or num_bytes < MIN_BYTES or group is None:
            return None
        if self._is_reachable is None:
            self._is_reachable = reach_each_other(group, device)
        if self._is_reachable and (self.buffers is None or self.buffers.num_bytes < num_bytes):
            torch.cuda.synchronize(device)  # work in flight may use the buffers that are replaced
            self.buffers = None
            self._make_buffers(rank, group, device, max(num_bytes, self.min_buffer_bytes))
        return self.buffers

    def _make_buffers(self, rank: int, group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> None:
        """Sets ``buffers``; where one rank has no room for them, sums go through NCCL from now on. Collective."""
        import torch.distributed._symmetric_memory as symmetric_memory

        torch.cuda.empty_cache()  # this memory does not come from torch's allocator, which keeps what it has freed
        num_bytes = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        memory = None
        if 2 * num_bytes <= MAX_SHARE * torch.cuda.mem_get_info(device)[0]:
            memory = symmetric_memory.empty(2 * num_bytes + PADS_BYTES, dtype=torch.uint8, device=device)
        has_room = torch.tensor(float(memory is not None), device=device)
        dist.all_reduce(has_room, op=dist.ReduceOp.MIN, group=group)
        if has_room.item() and memory is not None:
            self.buffers = PeerBuffers(rank, group, memory)
        else:
            self.enabled = False
            log.warning(
                "sums over ranks go through NCCL: got too little free memory on a GPU for %.2f GB of buffers, expected "
                "twice as much; lower train.max_micro_batch_tokens", 2 * num_bytes / 1e9,
            )  # fmt: skip

    @property
    def intact(self) -> Tensor | None:
        """1 (fp32 [1], on the device) as long as no barrier was aborted, then 0; None where there are no buffers."""
        return None if self.buffers is None else self.buffers.intact

    def abort(self) -> None:
        """Let barriers return that wait for the other rank, now and later. From any thread."""
        if (buffers := self.buffers) is not None:
            buffers.abort()

    def allocated_bytes(self) -> int:
        """Device memory of the buffers on this rank, which torch's allocator does not count."""
        return 0 if self.buffers is None else 2 * self.buffers.num_bytes

    def barrier(self) -> None:
        """Call it before and after captured work: what runs next may begin with either half of the buffers. Collective."""
        if self.buffers is not None:
            self.buffers.barrier()

    def reset_buffers(self) -> None:
        """After a capture that failed on some ranks, let all of them begin with the same half again. Collective.

        Ranks may have counted different numbers of sums. One that then took the other half would read what nobody wrote.
        """
        if self.buffers is not None:
            self.buffers.reset()

    def release(self) -> None:
        """Drop the buffers, with the process group that they were made over."""
        self.buffers = None


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


def first_rows(rows: int, contracted: int, columns: int) -> int:
    """How many rows of a product [rows, contracted] @ [contracted, columns] to copy while the others are multiplied.

    As many as can be copied during the other rows' product; none if the product is small, or if the adding kernel
    cannot divide it.
    """
    quarters = 3 if contracted >= columns else 2
    return 0 if columns % 16 else rows * quarters // (4 * FIRST_ROWS) * FIRST_ROWS


def _uuid(device: torch.device | int) -> bytes:
    return str(torch.cuda.get_device_properties(device).uuid).encode()


class PeerBuffers:
    """Memory of two ranks that both can read, in two halves that take turns.

    While the other rank may still read one half, the next sum uses the other half, so that one barrier for each sum is
    enough. The barriers are kernels of our own: torch's wait without end, or end the CUDA context, and under MPS perhaps the
    server's too. After ``abort`` they return, and ``intact`` (fp32 [1], on the device) is 0: what is computed from then on
    is wrong, and the optimizer does not write it.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup, memory: Tensor) -> None:
        """Maps ``memory`` (symmetric, uint8 [2 x the bytes of a sum + PADS_BYTES]) of each rank into the other. Collective.
        Raises RuntimeError where that is impossible."""
        import torch.distributed._symmetric_memory as symmetric_memory

        from apollo_tp.distributed.peer_kernels import add, barrier  # here: a CPU build of torch has no Triton

        self._add, self._barrier = add, barrier
        self.num_bytes = num_bytes = (memory.numel() - PADS_BYTES) // 2
        self._handle: _SymmetricMemory = symmetric_memory.rendezvous(memory, group)
        other = self._handle.get_buffer(1 - rank, (memory.numel(),), torch.uint8)
        self._halves = [tuple(m[i * num_bytes : (i + 1) * num_bytes] for m in (memory, other)) for i in (0, 1)]
        pads = [m[2 * num_bytes :].view(torch.int32).view(CHANNELS, -1) for m in (memory, other)]
        self._pads = list(zip(*(pad[:, 0] for pad in pads), strict=True))
        pads[0].zero_()
        self.intact = torch.ones(1, device=memory.device)
        self._aborted = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        torch.cuda.synchronize(memory.device)
        dist.barrier(group, device_ids=[memory.device.index])  # the other rank's pads are zero too
        self._copies = torch.cuda.Stream(memory.device, priority=-1)  # need not wait for a product's last blocks
        self._turn = 0
        self.barrier()  # compiles the kernel, which is not possible while work is captured

    def abort(self) -> None:
        """See ``PeerSums.abort``."""
        self._aborted.fill_(1)

    def _meet(self, channel: int) -> None:
        """A barrier of both ranks in the current stream, unless aborted."""
        mine, theirs = self._pads[channel]
        self._barrier(mine, theirs, self._aborted, self.intact)

    def sum_product(
        self,
        product: Product,
        alongside: Callable[[], None] | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``TPGroup.sum_product`` of at most ``num_bytes``. Two collective barriers at most, no NCCL.

        With ``alongside``, a copy engine reads the other rank's product while that work runs: a kernel would take
        multiprocessors from it.
        """
        mine, other = self._next_half(*product.shape, product.dtype)
        if alongside is None:
            return self._sum_in_blocks(product, mine, other, residual)
        product.write(mine)
        copy = torch.empty_like(mine)
        self._start_copy(other, copy)
        alongside()
        torch.cuda.current_stream().wait_stream(self._copies)
        return mine.add(copy)

    def _sum_in_blocks(self, product: Product, mine: Tensor, other: Tensor, residual: Tensor | None) -> Tensor:
        """The sum of ``product`` over both ranks, where ``mine`` and ``other`` [m, n] are the ranks' buffers.

        In captured work the first rows are copied from the other rank while the other rows are multiplied. Otherwise
        the host's five further calls would cost more than that saves.
        """
        rows, columns = mine.shape
        captured = mine.is_cuda and torch.cuda.is_current_stream_capturing()
        first = first_rows(rows, product.contracted, columns) if captured else 0
        copy = torch.empty_like(mine[:first])
        if first:
            product.write(mine[:first])
            self._start_copy(other[:first], copy)
        product.write(mine[first:], first)
        self._meet(0)
        if first:
            torch.cuda.current_stream().wait_stream(self._copies)
        elif residual is None:
            return mine + other
        return self._add(mine, copy, other, None if residual is None else residual.contiguous())

    def _start_copy(self, other: Tensor, copy: Tensor) -> None:
        """Copy ``other`` to ``copy`` once both ranks have come here, concurrently with what is launched next."""
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self._meet(1)
            copy.copy_(other, non_blocking=True)

    def barrier(self) -> None:
        """Wait until both ranks are here, after which neither reads the other's memory any more. Collective."""
        self._meet(2)

    def reset(self) -> None:
        """After work that may be incomplete on either rank, let both begin with the same half again. Collective."""
        self.barrier()
        self._turn = 0

    def _next_half(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Views [rows, columns] of this rank's and of the other rank's half whose turn it is."""
        self._turn ^= 1
        num_bytes = dtype.itemsize * rows * columns
        mine, other = (half[:num_bytes].view(dtype).view(rows, columns) for half in self._halves[self._turn])
        return mine, other
