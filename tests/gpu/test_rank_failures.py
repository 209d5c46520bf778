"""A rank that fails while another waits for it on the device: barriers of peer memory, NCCL, and the server under MPS."""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apollo_tp.config import Precision
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CollectiveError
from apollo_tp.optim import Optimizer, OptimParameter
from tests.support import optim_model as model
from tests.support.demo_model import make_model, standard_library_text
from tests.support.faults import check_raise_in_the_optimizer
from tests.support.optim_model import loss_of, same, snapshot
from tests.support.processes import free_port, start_server
from tests.support.ranks import run_ranks
from tests.support.servers import SERVER_ARGS, START_SECONDS, Server

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

TIMEOUT = datetime.timedelta(seconds=300)
SHAPES = (1024, 256, 1024)
"""Rows, contracted and columns of a product in bf16 whose sum is 2 MiB."""


class InjectedError(Exception):
    """What rank 1 raises."""


def _fail(tp: TPGroup, place: str, num_sums: int) -> list[str]:
    """Rank 1 raises in place of a sum through peer memory, or between two sums of its optimizer; what is wrong then."""
    torch.cuda.set_device(tp.rank)
    alarm, tp = Alarm.join(Control(tp.rank, tp.size)), TPGroup(tp.rank, tp.size)
    tp.on_leave = alarm.ring
    tp.form("nccl", TIMEOUT)
    alarm.watch(tp)
    tp.peers.reserve(tp.rank, tp.size, tp.group, torch.device("cuda", tp.rank), 2**21)
    params = [
        OptimParameter(p.shard, torch.nn.Parameter(p.tensor.detach().cuda()), p.role)
        for p in model.parameters(tp, torch.bfloat16)
    ]
    optimizer = Optimizer(model.config(check_replicas_every=0), Precision.remainder, params, tp)
    rows, contracted, columns = SHAPES
    a, b = (torch.full(shape, 1e-2, device="cuda").bfloat16() for shape in ((rows, contracted), (contracted, columns)))

    def step(number: int, fails: bool) -> None:
        optimizer.zero_grad()
        factor = torch.ones((), device="cuda")
        for position in range(8):
            if fails and tp.rank == 1 and place == "sum" and position == num_sums:
                raise InjectedError
            factor = factor * tp.summed_products([(a, b)]).float().mean() / 0.0512
        whole = {n: g.cuda() * factor for n, g in model.gradients(number).items()}
        loss_of(params, whole).backward()
        if fails and tp.rank == 1 and place == "optimizer":
            optimizer.update_group._gather_scales = _raise  # type: ignore[method-assign]
        assert optimizer.step(loss=factor).skipped == ""

    found = [] if tp.peers.buffers is not None else ["sums do not go through peer memory"]
    step(0, False)
    for number in (1, 2):
        before, started = snapshot(optimizer), time.monotonic()
        try:
            step(number, True)
            found.append(f"rank {tp.rank}: no error")
        except (CollectiveError, InjectedError, dist.DistError) as error:
            kind = type(error).__name__
        tp.dissolve()
        if (seconds := time.monotonic() - started) > 15:
            found.append(f"rank {tp.rank}: {kind} after {seconds:.0f} s")
        if not same(before, snapshot(optimizer)):
            found.append(f"rank {tp.rank} has written")
        dist.barrier()  # of the default group (gloo)
        vars(optimizer.update_group).pop("_gather_scales", None)
        optimizer.zero_grad()
        alarm.next_epoch()
        tp.form("nccl", TIMEOUT)
    step(1, False)
    alarm.stop()
    return found


class _Recorded:
    """An all-reduce of this group in a CUDA graph, which keeps NCCL's communicator until it is dropped."""

    def __init__(self, tp: TPGroup) -> None:
        self.total, self.graph = torch.ones(2**20, device="cuda"), torch.cuda.CUDAGraph()
        dist.all_reduce(self.total, group=tp.group)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            dist.all_reduce(self.total, group=tp.group)

    def drop(self) -> None:
        del self.graph


def _leave_recorded(tp: TPGroup) -> float:
    torch.cuda.set_device(tp.rank)
    tp = TPGroup(tp.rank, tp.size)
    tp.form("nccl", TIMEOUT)
    recorded = _Recorded(tp)
    tp.call_before_dissolve(recorded.drop)
    recorded.graph.replay()
    torch.cuda.synchronize()
    started = time.monotonic()
    tp.dissolve()
    return time.monotonic() - started


@pytest.mark.multigpu
def test_a_group_with_recorded_collectives_is_left() -> None:
    assert max(run_ranks(_leave_recorded, 2, deadline_seconds=100)) < 10


def _raise(*_: object) -> None:
    raise InjectedError


@pytest.mark.multigpu
@pytest.mark.parametrize(("place", "num_sums"), [("sum", 0), ("sum", 5), ("optimizer", 0)])
def test_the_other_rank_is_woken_and_writes_nothing(place: str, num_sums: int) -> None:
    assert run_ranks(_fail, 2, place, num_sums, deadline_seconds=240) == [[], []]


@pytest.fixture(scope="module")
def mps() -> Iterator[dict[str, str]]:
    """A control daemon of its own; yields the variables that its clients need. One for all tests: this process is a client
    too, from its first look at served weights on, and cannot become one of a second daemon."""
    script = Path(__file__).parents[2] / "launch/mps.sh"
    exports = subprocess.run([script, "start"], capture_output=True, text=True, check=True, timeout=60).stdout
    variables = dict(word.split("=", 1) for word in shlex.split(exports) if "=" in word)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield variables
    finally:
        subprocess.run([script, "stop"], check=False, timeout=90)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.mark.skipif(shutil.which("nvidia-cuda-mps-control") is None, reason="no MPS on this machine")
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.multigpu)], ids=["TP1", "TP2"])
def test_under_mps_a_rank_that_raises_in_its_optimizer_freezes_nothing(
    size: int, mps: dict[str, str], tmp_path: Path
) -> None:
    """The server is another client of the same MPS server, which a process that ends in a running kernel may take along."""
    tmp_path.chmod(0o700)
    make_model(tmp_path / "model", standard_library_text(1000, 30), vocab_size=1003, num_layers=2)
    port = free_port()
    process = start_server(
        tmp_path / "model", port, tmp_path, tmp_path / "server.log", tensor_parallel=size, extra=SERVER_ARGS,
        environment=mps,
    )  # fmt: skip
    try:
        process.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        server = Server(f"http://127.0.0.1:{port}", tmp_path / "model", tmp_path, "demo", process)
        check_raise_in_the_optimizer(server, tmp_path, ["qos.sm_percent=50", "qos.low_priority=true"])
    finally:
        process.stop()
