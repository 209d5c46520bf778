"""Sums through the other rank's memory against NCCL's, on two real GPUs."""

from __future__ import annotations

import datetime
import time

import pytest
import torch
import torch.distributed as dist

from apollo_tp.distributed.peer_memory import first_rows
from apollo_tp.distributed.tp_group import TPGroup
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(200)]

SHAPES = ((1000, 1536, 4096), (4096, 1536, 4096), (2050, 512, 1024))
"""Rows, contracted, columns."""


def _count_wrong(tp: TPGroup) -> tuple[int, bool]:
    torch.cuda.set_device(tp.rank)
    torch.manual_seed(tp.rank)
    peers, nccl = (TPGroup.world("nccl", datetime.timedelta(seconds=60)) for _ in range(2))
    nccl.peers.enabled = False
    wrong = 0
    for step in range(90):
        rows, contracted, columns = SHAPES[step % len(SHAPES)]
        a = torch.randn(rows, contracted, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(contracted, columns, device="cuda", dtype=torch.bfloat16)
        alongside = torch.empty(contracted, columns, device="cuda", dtype=torch.bfloat16)
        expected = nccl.all_reduce_(a @ b)
        if step % 7 == tp.rank:
            time.sleep(0.003)  # now one rank is late, now the other
        got = [peers.summed_products([(a, b)]) for _ in range(2)]
        got_alongside = peers.summed_products([(a, b)], lambda: torch.mm(a.T, expected, out=alongside))  # noqa: B023
        got.append(peers.summed_products([(a, b)]))
        residual = torch.randn_like(expected)
        dist.broadcast(residual, 0, group=nccl.group)
        wrong += not torch.equal(peers.summed_products([(a, b)], residual=residual), expected + residual)
        wrong += sum(not torch.equal(one, expected) for one in got) + (not torch.equal(got_alongside, expected))
        wrong += not torch.equal(alongside, a.T @ expected)
    dist.barrier()
    return wrong, peers.peers.buffers is not None


def test_sums_equal_those_of_nccl_bit_for_bit() -> None:
    """Two numbers have one sum. In turns, with ranks late, with and without work alongside, memory growing in between."""
    assert run_ranks(_count_wrong, 2, deadline_seconds=150) == [(0, True), (0, True)]


def _count_wrong_replays(tp: TPGroup) -> int:
    torch.cuda.set_device(tp.rank)
    torch.manual_seed(tp.rank)
    peers, nccl = (TPGroup.world("nccl", datetime.timedelta(seconds=60)) for _ in range(2))
    wrong = 0
    for rows, contracted, columns in (*SHAPES, (1024, 4096, 1024)):
        a, b, weight, residual = (
            torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
            for shape in ((rows, contracted), (contracted, columns), (contracted, columns), (rows, columns))
        )
        peers.summed_products([(a, b)])  # makes the memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            peers.peers.barrier()
            plain = peers.summed_products([(a, b)])
            joined = peers.summed_products([(a, b)], residual=residual)
            alongside = peers.summed_products([(a, b)], lambda: torch.mm(a.T, residual, out=weight))  # noqa: B023
            again = peers.summed_products([(a, b)])
            peers.peers.barrier()
        first = first_rows(rows, contracted, columns)
        for step in range(12):
            a.normal_()
            b.normal_()
            dist.broadcast(residual.normal_(), 0, group=nccl.group)
            in_blocks = nccl.all_reduce_(torch.cat([a[:first] @ b, a[first:] @ b]))
            expected = nccl.all_reduce_(a @ b)
            if step % 7 == tp.rank:
                time.sleep(0.003)
            graph.replay()
            wrong += sum(not torch.equal(one, in_blocks) for one in (plain, again))
            wrong += not torch.equal(joined, in_blocks + residual)
            wrong += not torch.equal(alongside, expected)
            wrong += not torch.equal(weight, a.T @ residual)
        del graph
    dist.barrier()
    return wrong


def test_recorded_sums_equal_those_of_nccl_bit_for_bit() -> None:
    """Where they are recorded, a part of a sum is read while the other part is multiplied."""
    assert run_ranks(_count_wrong_replays, 2, deadline_seconds=150) == [0, 0]
