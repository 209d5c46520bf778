"""What a step promises around its numbers: its learning rate, when it may write, who is blamed, what is compared again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apollo_tp.config import Precision, SyncMode
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ApolloTpError, DeadlineError, ReplicaError
from apollo_tp.inspect.exactness import samples
from apollo_tp.model.gradients import BUCKET_BYTES
from apollo_tp.optim import Optimizer
from apollo_tp.optim import update_group as bundle
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.training.update_gate import UpdateGate
from apollo_tp.wire import commands
from tests.support import optim_model
from tests.support.families import CASES
from tests.support.rank_loops import Loop, in_forward
from tests.support.rank_services import RecordingServices
from tests.support.ranks import run_ranks
from tests.support.trainers import CASE, CONFIG, make_trainer, preference_pairs


def _distance(before: dict[str, Tensor], tensors: dict) -> float:
    return sum(float((tensor - before[name]).square().sum()) for name, (_, tensor) in tensors.items()) ** 0.5


@pytest.mark.parametrize("dpo", [False, True], ids=["step", "preference step"])
def test_half_the_rate_moves_the_weights_half_as_far(dpo: bool, checkpoints: Path) -> None:
    """And stored gradients, too, are written only once the server may have been paused for it."""
    moved = []
    for scale in (1.0, 0.5):
        trainer, tensors = make_trainer(TPGroup.single(), checkpoints / CASES[CASE].checkpoint)
        before = {name: tensor.clone() for name, (_, tensor) in tensors.items()}
        asked: list[float] = []
        trainer._before_write = lambda: asked.append(_distance(before, tensors))  # noqa: B023 - called in this round
        result = trainer.preference_step(preference_pairs(), 0.3, scale) if dpo else trainer.step(samples(), scale)
        assert (result.gradients, asked) == ("stored", [0.0])
        moved.append(_distance(before, tensors))
    assert moved[1] == pytest.approx(0.5 * moved[0], rel=1e-3)


def test_the_rank_loop_passes_the_rate_on_and_records_the_step(checkpoints: Path) -> None:
    trainer, _ = make_trainer(TPGroup.single(), checkpoints / CASES[CASE].checkpoint)
    services = RecordingServices()
    loop = RankLoop(trainer, services, Control(0, 1), None)
    command = commands.Step(id="j/1", job_id="j", job_step=1, samples=samples(), learning_rate_scale=0.25)
    done = loop.execute(command)
    assert isinstance(done, commands.StepDone)
    assert done.figures.learning_rate == 0.25 * CONFIG.lr
    assert services.steps == [(command, done.figures)]
    loop.execute(commands.Identify(id="identify/1"))
    assert services.hellos == ["identify/1"]


def _blamed(tp: TPGroup, checkpoint: Path) -> int:
    loop = Loop(tp.rank, tp.size, checkpoint)
    if tp.rank == 1:
        in_forward(loop.trainer)
    reply = loop.step(1)
    assert isinstance(reply, commands.CommandFailed)
    return reply.rank


def test_the_rank_that_raised_is_named(checkpoints: Path) -> None:
    """Not the one that lost its peer in a collective because of it."""
    assert run_ranks(_blamed, 2, checkpoints / CASES[CASE].checkpoint) == [1, 1]


def _parted_later(tp: TPGroup, checkpoint: Path) -> str:
    """A gradient of something that all ranks hold is halved on one of them, in the second step."""
    trainer, _ = make_trainer(tp, checkpoint, replace(CONFIG, check_replicas_every=2))
    trainer.step(samples())
    norm = next(p for p in trainer.model.parameters if p.name.endswith("1.input_layernorm.weight"))
    if tp.rank:
        norm.leaf.register_hook(lambda gradient: gradient * 0.5)
    try:
        trainer.step(samples())
    except ReplicaError:
        return "found"
    return "unseen"


def test_gradients_of_norms_are_compared_again_with_the_replicas(checkpoints: Path) -> None:
    assert run_ranks(_parted_later, 2, checkpoints / CASES[CASE].checkpoint) == ["found"] * 2


class _Deaf:
    """A lock whose server does not pause."""

    def pause(self, patience: float = 1.0) -> None:
        raise DeadlineError("injected")


def _gate(tp: TPGroup) -> str:
    gate = UpdateGate(SyncMode.drain, tp, torch.device("cpu"), _Deaf() if tp.rank == 0 else None)  # type: ignore[arg-type]
    try:
        gate.before_write()
    except ApolloTpError as error:
        return type(error).__name__
    return "wrote"


def test_no_rank_writes_if_the_server_could_not_be_paused() -> None:
    assert run_ranks(_gate, 2) == ["DeadlineError", "RankFailedError"]


class _Noting:
    """A lock that notes when the server is paused."""

    def pause(self, patience: float = 1.0) -> None:
        self.paused_at = time.time()


def _be_late(tp: TPGroup) -> float:
    """When this rank had its gradients, or on rank 0 when the server was paused; Unix time."""
    lock = _Noting()
    gate = UpdateGate(SyncMode.step_lock, tp, torch.device("cpu"), lock if tp.rank == 0 else None)  # type: ignore[arg-type]
    time.sleep(0.5 * tp.rank)
    ready = time.time()
    gate.before_write()
    return lock.paused_at if tp.rank == 0 else ready


def test_the_server_runs_until_the_slowest_rank_has_its_gradients() -> None:
    paused, *ready = run_ranks(_be_late, 3)
    assert paused >= max(ready)


def _in_buckets(tp: TPGroup) -> tuple[float, int]:
    """The largest difference of weights between few groups of matrices and many, and how many."""
    ends = []
    for size in (bundle.BUCKET_BYTES, 20_000):
        bundle.BUCKET_BYTES = size
        parameters = optim_model.parameters(tp)
        optimizer = Optimizer(optim_model.config(), Precision.remainder, parameters, tp)
        for step in range(3):
            optim_model.set_gradients(parameters, optim_model.gradients(step))
            assert optimizer.step().skipped == ""
        ends.append(optim_model.local_values(parameters))
    gaps = [abs(ends[0][name] - values).max() for name, values in ends[1].items() if values.size]
    return float(max(gaps)), len(optimizer.update_group.groups)


def test_matrices_of_a_large_model_come_in_groups_and_none_is_left_out() -> None:
    """1e-7: sums over other shapes are rounded otherwise."""
    for gap, groups in run_ranks(_in_buckets, 2):
        assert groups > 2
        assert gap < 1e-7


def _norms_one_by_one(tp: TPGroup, checkpoint: Path) -> bool:
    """A step with the smallest buckets of replicated gradients equals one with the usual ones, bit for bit."""
    ends = []
    for size in (BUCKET_BYTES, 1):
        trainer, tensors = make_trainer(tp, checkpoint)
        trainer.model.gradient_sync.bucket_bytes = size
        trainer.step(samples())
        ends.append({name: tensor.clone() for name, (_, tensor) in tensors.items()})
    return all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_gradients_that_ranks_share_come_in_buckets_and_none_is_left_out(checkpoints: Path) -> None:
    assert run_ranks(_norms_one_by_one, 2, checkpoints / CASES[CASE].checkpoint) == [True] * 2


def _unequal(tp: TPGroup, how: str) -> list[str]:
    """Which replicas are found to differ."""
    parameters = optim_model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(optim_model.config(check_replicas_every=1), Precision.remainder, parameters, tp)
    weight = next(each for each in optimizer.weights if each.name == "router.weight")
    if tp.rank == 1 and how == "remainder":
        assert weight.remainder is not None
        weight.remainder[0, 0] += 1
    elif tp.rank == 1:
        weight.data[0, :2] = weight.data[0, :2].flip(0)
    return optimizer.resync_replicas()


@pytest.mark.parametrize("how", ["remainder", "swapped"])
def test_replicas_differ_by_their_remainders_and_by_order_too(how: str) -> None:
    assert run_ranks(_unequal, 2, how) == [["router.weight"]] * 2
