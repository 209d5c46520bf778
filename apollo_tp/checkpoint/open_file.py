"""A safetensors file that is read in blocks of rows, by several threads."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apollo_tp.shards.boxes import Box
from apollo_tp.shards.mapping import DTYPES

READ_ERRORS = (OSError, SafetensorError, ValueError, KeyError)
"""What a file that is damaged or gone raises here."""


class OpenFile:
    """The tensors of the file at ``path``, which stays open, so that what is read twice is the same. Raises READ_ERRORS."""

    def __init__(self, path: Path) -> None:
        self._library: Any = safe_open(path, framework="pt")  # checks the header
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        header = json.loads(os.pread(self._file, length, 8))
        self._start = {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if "shape" in entry
        }
        self.metadata: dict[str, str] = self._library.metadata() or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and the shape of a tensor."""
        stored = self._library.get_slice(name)
        return DTYPES[stored.get_dtype()], tuple(stored.get_shape())

    def read_into(self, values: Tensor, name: str, box: Box) -> None:
        """Fill ``values``, contiguous in host memory, with those in ``box`` of a tensor, whose shape and dtype it has.

        A copy out of mapped memory takes longer than a read, since each page has to be found first; it is for parts of
        rows, which would be many reads."""
        _, shape = self.form(name)
        if not box.shape or not box.numel or box.shape[1:] != shape[1:]:
            mapped = self._library.get_slice(name)[box.slices()] if box.shape else self._library.get_tensor(name)
            values.copy_(mapped)
            return
        start = self._start[name] + box.offset[0] * math.prod(shape[1:]) * values.dtype.itemsize
        if (got := os.preadv(self._file, [values.view(torch.uint8).numpy()], start)) != values.nbytes:
            raise OSError(f"{name}: got {got} bytes from byte {start} on, expected {values.nbytes}; the file was cut")
