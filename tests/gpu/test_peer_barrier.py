"""The barrier of sums through peer memory on one GPU: two streams, or two processes, stand for the two ranks."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.distributed.tp_group import TPGroup
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

MEETINGS = 300
INTS = 2**18
"""Numbers that a rank writes before each meeting."""


class Rank:
    """One side of the barrier: its int32 ``memory`` [2 halves, INTS] and ``pad`` [1], and the other side's."""

    def __init__(self, memory: Tensor, pad: Tensor) -> None:
        from apollo_tp.distributed.peer_kernels import barrier  # here: a CPU build of torch has no Triton

        self.memory, self.pad, self._barrier = memory, pad, barrier
        self.their_memory, self.their_pad = memory, pad
        self.aborted = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.intact = torch.ones(1, device="cuda")
        self.stream = torch.cuda.Stream()
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def meet(self, number: int, late: bool) -> None:
        """Write ``number``, meet, and count what of the other's numbers is not ``number``."""
        half = number % 2
        if late:
            torch.cuda._sleep(100_000)
        self.memory[half].fill_(number)
        self.wait()
        self.wrong += (self.their_memory[half] != number).sum()

    def wait(self) -> None:
        """The barrier alone."""
        self._barrier(self.pad, self.their_pad, self.aborted, self.intact)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` with aborted barriers: CUDA loads kernels when they are first launched, and some loads wait for all
        that runs, so that a barrier would wait for one that is launched after it."""
        self.aborted.fill_(1)
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.synchronize()
        self.aborted.zero_()
        self.intact.fill_(1)
        for tensor in (self.wrong, self.pad, self.their_pad, self.memory):
            tensor.zero_()
        torch.cuda.synchronize()


def _memory() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, INTS, dtype=torch.int32, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")[:1]


def _two_streams(tp: TPGroup) -> tuple[int, float, float]:
    """Wrong numbers, intact, and microseconds of a recorded barrier."""
    ranks = [Rank(*_memory()) for _ in range(2)]
    for rank, other in (ranks, ranks[::-1]):
        rank.their_memory, rank.their_pad = other.memory, other.pad
    for rank in ranks:
        rank.warm_up(functools.partial(rank.meet, 0, late=True))
    for number in range(MEETINGS):
        for index in (0, 1) if number % 2 else (1, 0):
            with torch.cuda.stream(ranks[index].stream):
                ranks[index].meet(number, late=number % 3 == index)
    torch.cuda.synchronize()
    found = sum(int(rank.wrong) for rank in ranks), min(float(rank.intact) for rank in ranks)
    graphs = [_recorded(rank, MEETINGS) for rank in ranks]
    for rank, graph in zip(ranks, graphs, strict=True):
        rank.warm_up(graph.replay)
    started = time.perf_counter()
    for rank, graph in zip(ranks, graphs, strict=True):
        with torch.cuda.stream(rank.stream):
            graph.replay()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return *found, seconds / MEETINGS * 1e6


def _recorded(rank: Rank, number: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.stream):
        for _ in range(number):
            rank.wait()
    return graph


def test_two_streams_meet_in_both_orders() -> None:
    """Each sees all that the other wrote before its barrier, at once and in recorded work."""
    ((wrong, intact, microseconds),) = run_ranks(_two_streams, 1, deadline_seconds=60)
    print(f"{microseconds:.2f} us for a recorded barrier")
    assert (wrong, intact) == (0, 1.0)


def _two_processes(tp: TPGroup) -> tuple[int, float]:
    rank = Rank(*_memory())
    handles: list[tuple[object, ...]] = [()] * 2
    shared = rank.memory.untyped_storage()._share_cuda_(), rank.pad.untyped_storage()._share_cuda_()
    dist.all_gather_object(handles, shared)
    memory, pad = (torch.UntypedStorage._new_shared_cuda(*handle) for handle in handles[1 - tp.rank])
    rank.their_memory = torch.empty(0, dtype=torch.int32, device="cuda").set_(memory).view(2, INTS)
    rank.their_pad = torch.empty(0, dtype=torch.int32, device="cuda").set_(pad)[:1]
    for turn in range(2):  # one after the other: each clears both pads
        if turn == tp.rank:
            rank.warm_up(lambda: rank.meet(0, late=True))
        dist.barrier()
    for number in range(MEETINGS):
        rank.meet(number, late=number % 3 == tp.rank)
    torch.cuda.synchronize()
    dist.barrier()
    return int(rank.wrong), float(rank.intact)


def test_two_processes_meet_through_mapped_memory() -> None:
    """As the ranks of a trainer do; the GPU switches between their contexts."""
    assert run_ranks(_two_processes, 2, deadline_seconds=60) == [(0, 1.0)] * 2


def _alone(tp: TPGroup) -> tuple[float, float]:
    rank, other = Rank(*_memory()), Rank(*_memory())
    rank.their_memory, rank.their_pad = other.memory, other.pad
    timer = threading.Timer(1.0, lambda: rank.aborted.fill_(1))
    timer.start()
    started = time.monotonic()
    for _ in range(200):  # a step's: all but the first return as soon as they look
        rank.wait()
    torch.cuda.synchronize()
    return time.monotonic() - started, float(rank.intact)


def test_a_barrier_that_nobody_joins_returns_when_it_is_aborted() -> None:
    """And says that what follows is wrong; so do those behind it."""
    ((seconds, intact),) = run_ranks(_alone, 1, deadline_seconds=60)
    assert seconds < 30, "the compilation of the kernel included"
    assert intact == 0
