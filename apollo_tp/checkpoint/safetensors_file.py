"""Safetensors files that many processes fill in place: the header is planned first, then every rank writes its boxes.

The safetensors library writes only full tensors; the format itself (8 bytes of header length, JSON, then the data)
makes writing boxes a matter of offsets. What is written here is read back with the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apollo_tp.shards.boxes import Box
from apollo_tp.shards.mapping import NAMES


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: global shape, dtype, and its first byte counted from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start_byte: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[bytes, dict[str, Entry]]:
    """Header bytes and entries of a file with these tensors, in this order."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts 8-byte aligned
    entries, position = {}, 8 + len(encoded)
    for name, shape, dtype in tensors:
        entries[name] = Entry(name, shape, dtype, position)
        position += entries[name].num_bytes
    return len(encoded).to_bytes(8, "little") + encoded, entries


def create(path: Path, header: bytes, entries: dict[str, Entry]) -> None:
    """Create a 0600 file with its header and room for all tensors. Raises OSError if the disk is too full: later, when
    the file is mapped into memory, that would be a SIGBUS."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, len(header) + sum(entry.num_bytes for entry in entries.values()))


def write_box(path: Path, entry: Entry, box: Box, values: Tensor) -> None:
    """Write a box of a tensor (in global coordinates) from ``values``, a local tensor of the box's shape on any device,
    cast to the entry's dtype. The caller flushes the file (fsync) after its last box."""
    if not box.numel:
        return
    bits = {
        1: (torch.uint8, np.uint8),
        2: (torch.int16, np.int16),
        4: (torch.int32, np.int32),
        8: (torch.int64, np.int64),
    }
    torch_bits, numpy_bits = bits[entry.dtype.itemsize]
    content = values.detach().to("cpu", entry.dtype).contiguous().view(torch_bits).numpy()
    target = np.memmap(path, dtype=numpy_bits, mode="r+", offset=entry.start_byte, shape=entry.shape or (1,))
    target[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = content
