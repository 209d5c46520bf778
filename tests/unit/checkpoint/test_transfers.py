"""Copies by several threads: every element once, and memory that is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apollo_tp.checkpoint import transfers
from apollo_tp.checkpoint.open_file import OpenFile
from apollo_tp.checkpoint.transfers import HostMemory, Transfers, needed, rows_of
from apollo_tp.shards.boxes import Box


@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (4, 3, 2), (2, 0)])
@pytest.mark.parametrize("chunk_bytes", [1, 24, 2**20])
def test_blocks_of_rows_are_the_box(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], chunk_bytes: int) -> None:
    """Each element once, in blocks that are no larger than they may be, or one row."""
    monkeypatch.setattr(transfers, "CHUNK_BYTES", chunk_bytes)
    offset = tuple(range(10, 10 + len(shape)))
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in rows_of(Box(offset, shape), 4):
        counts[box.slices(offset)] += 1
        assert box.numel * 4 <= chunk_bytes or box.shape[:1] in ((), (1,))
    assert bool((counts == 1).all())


def test_copies_are_equal_and_in_memory_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors of any layout; those of the next call replace them, in the same place if it is large enough."""
    monkeypatch.setattr(transfers, "CHUNK_BYTES", 64)
    matrix = torch.arange(600, dtype=torch.float32).view(20, 30)
    tensors = [matrix, matrix.t(), matrix[3:9, 4:7], matrix.to(torch.int8), torch.tensor(3.0), torch.empty(0, 4)]
    memory = HostMemory()
    with Transfers(torch.device("cpu")) as threads:
        copies = memory.copies(tensors, threads)
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
        assert all(copy.is_contiguous() for copy in copies)
        assert memory.num_bytes == needed(tensors)
        place = copies[0].data_ptr()
        matrix.add_(1.0)
        again = memory.copies(tensors[:1], threads)
        assert torch.equal(again[0], matrix)
        assert again[0].data_ptr() == place
    memory.release()
    assert memory.num_bytes == 0
    assert torch.equal(again[0], matrix), "what is used still lives"


def test_an_error_in_a_thread_is_raised_by_who_waits() -> None:
    with Transfers(torch.device("cpu")) as threads, pytest.raises(ZeroDivisionError):
        list(threads.run(lambda number: 1 // number, [1, 0, 2]))


def test_any_box_of_a_file_is_read(tmp_path: Path) -> None:
    """Whole rows, parts of rows, matrices of matrices, a number and nothing, of several dtypes."""
    matrix = torch.arange(600, dtype=torch.float32).view(20, 30)
    tensors = {"m": matrix, "s": matrix.bfloat16().view(5, 4, 30), "b": matrix.to(torch.int8), "n": torch.tensor(3.0)}
    save_file(tensors | {"e": torch.empty(0, 4)}, tmp_path / "t.safetensors", metadata={"some": "words"})
    file = OpenFile(tmp_path / "t.safetensors")
    boxes = [
        ("m", Box((3, 0), (9, 30))),
        ("m", Box((0, 4), (20, 5))),
        ("m", Box((7, 2), (1, 3))),
        ("s", Box((2, 1, 0), (2, 2, 30))),
    ]
    boxes += [
        ("s", Box((1, 0, 0), (3, 4, 30))),
        ("b", Box((19, 0), (1, 30))),
        ("n", Box((), ())),
        ("e", Box((0, 0), (0, 4))),
    ]
    with Transfers(torch.device("cpu")) as threads:
        read = threads.run(lambda each: threads.read(file, *each).clone(), boxes)
        for (name, box), values in zip(boxes, read, strict=True):
            assert torch.equal(values, ({"e": torch.empty(0, 4)} | tensors)[name][box.slices()]), (name, box)
    os.truncate(tmp_path / "t.safetensors", os.path.getsize(tmp_path / "t.safetensors") - 900)
    with Transfers(torch.device("cpu")) as threads, pytest.raises(OSError, match=r"s: got .* bytes .*, expected .*cut"):
        threads.read(file, "s", Box((0, 0, 0), (5, 4, 30)))
