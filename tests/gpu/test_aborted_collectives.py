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


def _abort(group: dist.ProcessGroup) -> None:
    group._get_backend(torch.device("cuda")).abort()


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
        aborted = threading.Timer(2.0, _abort, (tp.group,))
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
        if tp.rank == 1:
            _abort(tp.group)
        optimizer.zero_grad()
        tp.dissolve()
        tp.form("nccl", TIMEOUT)
        tp.at = -1
    step(2)
    return found


@pytest.mark.parametrize(
    ("in_backward", "clip"), [(False, None), (False, 1.0), (True, None)], ids=["stored", "clip", "in_backward"]
)
def test_what_is_queued_behind_an_aborted_collective_writes_nothing(in_backward: bool, clip: float | None) -> None:
    for rank, wrong in enumerate(run_ranks(_steps, 2, in_backward, clip, deadline_seconds=400)):
        assert not wrong, f"rank {rank}: {wrong[:3]}"
