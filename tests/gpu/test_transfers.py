"""Copies between a GPU and host memory by several threads, through pinned memory: the same bits, in the stream's order."""

from __future__ import annotations

import pytest
import torch

from apollo_tp.checkpoint import transfers
from apollo_tp.checkpoint.transfers import HostMemory, Transfers

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_values_go_to_the_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any layout and dtype, behind what is queued on the stream of whoever makes the threads."""
    monkeypatch.setattr(transfers, "CHUNK_BYTES", 2**16)
    device = torch.device("cuda:0")
    matrix = torch.randn(1024, 513)
    given = [matrix, matrix.t(), matrix[:, 5:77], matrix.bfloat16(), matrix.to(torch.int8), torch.tensor(3.0)]
    with torch.cuda.stream(torch.cuda.Stream(device)), Transfers(device) as threads:
        torch.cuda._sleep(10**8)
        there = list(threads.run(threads.to_device, given * 4))
        assert all(each.device == device for each in there)
        for each in there:
            each.add_(1)
        assert all(torch.equal(each.cpu(), one + 1) for each, one in zip(there, given * 4, strict=True))
        torch.cuda._sleep(10**8)
        for each in there:
            each.add_(1)
        copies = HostMemory().copies([*there, there[0].t()], threads)
        assert all(torch.equal(copy, each.cpu()) for copy, each in zip(copies, [*there, there[0].t()], strict=True))
