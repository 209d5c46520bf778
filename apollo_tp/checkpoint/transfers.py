"""Copies between the device and files or host memory, by several threads: under torchrun, a process has one for all else.

A copy from or to pageable memory runs at a fraction of the bus's speed. So each thread copies through a buffer of its own in
pinned memory; on a CPU nothing is between. Work on the device is queued on the stream of whoever made the threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from apollo_tp.checkpoint.open_file import OpenFile
from apollo_tp.shards.boxes import Box

CHUNK_BYTES = 8 * 2**20
"""Copied at a time by each thread: this much of the device's memory, and of pinned host memory, is taken."""
MAX_THREADS = 8
ALIGNMENT = 64
T = TypeVar("T")
R = TypeVar("R")


class Transfers:
    """Threads that copy to and from ``device``. A context manager, which waits for them at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, threading.local()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, "transfer", initializer=self._begin)

    def __enter__(self) -> Transfers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, action: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results of ``action``, in the order of ``items``, which are taken at once. Raises what it raises."""
        return self._pool.map(action, items)

    def read(self, file: OpenFile, name: str, box: Box) -> Tensor:
        """The values in ``box`` of a tensor in ``file``, on the device. In one of the threads, on a CPU until its next call;
        a copy to the device has ended when this returns. Raises READ_ERRORS."""
        values = self._buffer(box.shape, file.form(name)[0])
        file.read_into(values, name, box)
        return self._from_pinned(values)

    def to_device(self, values: Tensor) -> Tensor:
        """``values``, in host memory, on the device; on a CPU themselves. In one of the threads."""
        if self._stream is None:
            return values
        return self._from_pinned(self._buffer(values.shape, values.dtype).copy_(values))

    def to_host(self, values: Tensor, target: Tensor) -> None:
        """Copy ``values``, on the device, into ``target``, of that shape and dtype in host memory. In one of the threads."""
        if self._stream is not None:
            values = self._buffer(values.shape, values.dtype).copy_(values, non_blocking=True)
            self._stream.record_event().synchronize()
        target.copy_(values)

    def _from_pinned(self, values: Tensor) -> Tensor:
        """A copy of ``values`` on the device, which has ended; on a CPU themselves."""
        if self._stream is None:
            return values
        copy = values.to(self._device, non_blocking=True)
        self._stream.record_event().synchronize()
        return copy

    def _begin(self) -> None:
        torch.set_grad_enabled(False)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """This thread's memory, contiguous, pinned where there is a device."""
        num_bytes = math.prod(shape) * dtype.itemsize
        memory: Tensor | None = getattr(self._own, "memory", None)
        if memory is None or memory.numel() < num_bytes:
            pinned = self._stream is not None
            memory = torch.empty(max(CHUNK_BYTES, num_bytes), dtype=torch.uint8, pin_memory=pinned)
            self._own.memory = memory
        return memory[:num_bytes].view(dtype).view(shape)


def rows_of(box: Box, itemsize: int) -> Iterator[Box]:
    """``box`` in blocks of rows of at most CHUNK_BYTES, or of one row."""
    if not box.shape or not box.numel:
        yield box
        return
    (count, *rest), (first, *others) = box.shape, box.offset
    rows = max(1, CHUNK_BYTES // max(1, box.numel // count * itemsize))
    for start in range(0, count, rows):
        yield Box((first + start, *others), (min(rows, count - start), *rest))


class HostMemory:
    """Host memory for copies of tensors, which is kept for the next ones: to be given new pages takes longer than a copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    def copies(self, tensors: Sequence[Tensor], transfers: Transfers) -> list[Tensor]:
        """Contiguous copies of ``tensors``, valid until the next call."""
        self._reserve(needed(tensors))
        copies, start = [], 0
        for tensor in tensors:
            part = self._memory[start : start + tensor.nbytes]
            copies.append(part.view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        parts = (
            (tensor[rows], copy[rows])
            for tensor, copy in zip(tensors, copies, strict=True)
            for rows in row_slices(tensor)
        )
        for _ in transfers.run(lambda part: transfers.to_host(*part), parts):
            pass
        return copies

    def release(self) -> None:
        """Give the memory back, once no copy is used any more."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:
            self.release()  # before there is more
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)


def needed(tensors: Iterable[Tensor]) -> int:
    """Bytes of the copies of ``tensors``."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def row_slices(tensor: Tensor) -> Iterator[tuple[slice, ...]]:
    """``tensor`` in blocks of rows, as ``rows_of``: the index of each."""
    for box in rows_of(Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor.element_size()):
        yield tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
