"""Copies between a GPU and host memory by several threads, through pinned memory: the same bits, in the stream's order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apollo_tp.checkpoint import transfers
from apollo_tp.checkpoint.open_file import OpenFile
from apollo_tp.checkpoint.transfers import HostMemory, Transfers
from apollo_tp.shards.boxes import Box

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_values_go_to_the_device_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of any form and dtype, behind what is queued on the stream of whoever makes the threads."""
    monkeypatch.setattr(transfers, "CHUNK_BYTES", 2**16)
    device = torch.device("cuda:0")
    matrix = torch.randn(1024, 513)
    given = {"m": matrix, "b": matrix.bfloat16(), "i": matrix.to(torch.int8), "n": torch.tensor(3.0)}
    save_file(given, tmp_path / "t.safetensors")
    file, box = OpenFile(tmp_path / "t.safetensors"), Box((7, 5), (1000, 72))
    parts = [
        ("m", Box((0, 0), (1024, 513))),
        ("b", Box((9, 0), (700, 513))),
        ("m", box),
        ("i", box),
        ("n", Box((), ())),
    ] * 4
    with torch.cuda.stream(torch.cuda.Stream(device)), Transfers(device) as threads:
        torch.cuda._sleep(10**8)
        there = list(threads.run(lambda part: threads.read(file, *part), parts))
        assert all(each.device == device for each in there)
        for each in there:
            each.add_(1)
        wanted = [given[name][part.slices()] + 1 for name, part in parts]
        assert all(torch.equal(each.cpu(), one) for each, one in zip(there, wanted, strict=True))
        torch.cuda._sleep(10**8)
        for each in there:
            each.add_(1)
        copies = HostMemory().copies([*there, there[0].t()], threads)
        assert all(torch.equal(copy, each.cpu()) for copy, each in zip(copies, [*there, there[0].t()], strict=True))
        for copy in copies:
            copy.add_(1)
        back = list(threads.run(threads.to_device, copies))
        assert all(each.device == device for each in back)
        assert all(torch.equal(copy, each.cpu()) for copy, each in zip(copies, back, strict=True))
