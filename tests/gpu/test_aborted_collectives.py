"""Two GPUs: a rank raises inside its optimizer, and the other's communicator is aborted with decision and write queued."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from apollo_tp.config import Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CollectiveError
from apollo_tp.optim import Optimizer, OptimParameter
from tests.support import optim_model as model
from tests.support.optim_model import loss_of, same, snapshot
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(600)]

TIMEOUT = datetime.timedelta(seconds=300)
COLLECTIVES = ("all_reduce_", "reduce_scatter", "all_gather")


class InjectedError(Exception):
    """What rank 1 raises."""


class Dying(TPGroup):
    """A group whose rank 1 raises in the place of its ``at``-th collective from now on."""

    at = -1
    count = 0

    def _next(self) -> None:
        self.count += 1
        if self.rank == 1 and self.count - 1 == self.at:
            raise InjectedError


def _dying(name: str) -> object:
    def collective(self: Dying, *args: object, **kwargs: object) -> object:
        self._next()
        return getattr(TPGroup, name)(self, *args, **kwargs)

    return collective


for _name in COLLECTIVES:
    setattr(Dying, _name, _dying(_name))


def _calls_before_a_write(optimizer: Optimizer, tp: Dying, step: Callable[[], None]) -> int:
    """How many collectives there were when ``step`` first wrote."""
    group = optimizer.update_group if optimizer.in_backward is None else optimizer.in_backward.groups[0]
    write, counts = group.backend.write, []

    def noting(*args: object) -> None:
        counts.append(tp.count)
        write(*args)

    group.backend.write = noting  # type: ignore[method-assign]
    step()
    group.backend.write = write  # type: ignore[method-assign]
    return counts[0]


def _steps(tp: TPGroup, in_backward: bool, clip: float | None) -> list[str]:
    """What is wrong once rank 1 has raised in place of each collective before a step's first write, in turn."""
    torch.cuda.set_device(tp.rank)
    tp = Dying(tp.rank, tp.size)
    tp.form("nccl", TIMEOUT)
    params = [
        OptimParameter(p.shard, torch.nn.Parameter(p.tensor.detach().cuda()), p.role)
        for p in model.parameters(tp, torch.bfloat16)
    ]
    optimizer = Optimizer(model.config(max_grad_norm=clip, check_replicas_every=0), Precision.remainder, params, tp)
    if in_backward:
        optimizer.attach_in_backward()

    def step(number: int) -> None:
        optimizer.zero_grad()
        whole, loss = {n: g.cuda() for n, g in model.gradients(number).items()}, torch.tensor(1.0, device="cuda")
        if in_backward:
            optimizer.begin_step_in_backward(loss=loss)
        loss_of(params, whole).backward()
        assert optimizer.step(loss=loss).skipped == ""

    step(0)
    first, found = tp.count, []
    num_calls = _calls_before_a_write(optimizer, tp, lambda: step(1)) - first
    for at in range(num_calls):
        before, tp.count, tp.at = snapshot(optimizer), 0, at
        aborted = threading.Timer(2.0, tp.abort)
        if tp.rank == 0:
            aborted.start()
        try:
            step(2)
            found.append(f"{at} of {num_calls}: no error on rank {tp.rank}")
        except (CollectiveError, InjectedError):
            torch.cuda.synchronize()
        if tp.rank == 0:
            aborted.join()
        if not same(before, snapshot(optimizer)):
            found.append(f"{at} of {num_calls}: rank {tp.rank} has written")
        dist.barrier()  # of the default group (gloo)
        optimizer.zero_grad()
        tp.dissolve()
        tp.form("nccl", TIMEOUT)
        tp.at = -1
    step(2)
    return found


def _leave(tp: TPGroup) -> tuple[list[float], float]:
    """(values in the result of a sum that rank 1 never joined, ``intact`` behind it), on rank 0."""
    torch.cuda.set_device(tp.rank)
    tp = TPGroup(tp.rank, tp.size)
    tp.form("nccl", TIMEOUT)
    for number in range(1, 6):
        tp.reduce_scatter(torch.full((3000,), 10.0 * number + tp.rank, device="cuda"))
    torch.cuda.synchronize()
    left, intact = [], 1.0
    if tp.rank == 0:
        threading.Timer(0.5, tp.abort).start()
        summed = tp.reduce_scatter(torch.full((3000,), 1000.0, device="cuda"))
        intact = tp.intact(torch.device("cuda")).item()
        left = summed.unique().tolist()
    dist.barrier()  # of the default group (gloo)
    tp.dissolve()
    return left, intact


def test_what_an_aborted_sum_leaves_is_told_by_the_mark_alone() -> None:
    """NCCL adds what rank 0 sends to what rank 1 sent in an earlier sum: no NaN, and a canary would be right."""
    (left, intact), _ = run_ranks(_leave, 2, deadline_seconds=100)
    print("left by a sum of 1000 and what never came:", left)
    assert intact == 0


@pytest.mark.parametrize(
    ("in_backward", "clip"), [(False, None), (False, 1.0), (True, None)], ids=["stored", "clip", "in_backward"]
)
def test_what_is_queued_behind_an_aborted_collective_writes_nothing(in_backward: bool, clip: float | None) -> None:
    assert run_ranks(_steps, 2, in_backward, clip, deadline_seconds=400) == [[], []]
