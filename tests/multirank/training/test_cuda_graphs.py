"""Steps that are alike are replayed: when they are recorded, when not, and that they train as steps without a recording do.

A CPU has no graphs: a stand-in computes anew, into tensors that stay where they are. tests/gpu has the real ones.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from apollo_tp.config import GradientMode
from apollo_tp.distributed.peer_memory import PeerBuffers
from apollo_tp.distributed.products import SumOfProducts
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import samples
from apollo_tp.model import BoundModel
from apollo_tp.model.batch import PackedBatch, pack
from apollo_tp.training.cuda_graphs import GraphCache, assign_gradients
from tests.support.figures import without_times
from tests.support.gradient_runs import CONFIG, Run, differing, state
from tests.support.ranks import run_ranks

SHORT, LONG, TWO = (20, 11), (33, 17), (60, 60)
"""Lengths of a step's samples: one micro-batch each, and two that are alike."""


class Recomputed:
    """Passes that are recorded by running them once, which leaves only the shapes behind."""

    def __init__(self, model: BoundModel, batch: PackedBatch, before: Recomputed | None) -> None:
        self.model, self.batch, self.adds = model, batch, before is not None
        self.loss, self.correct = torch.zeros(()), torch.zeros(())
        if before is None:
            self._run()
            self.gradients = [None if leaf.grad is None else leaf.grad.fill_(torch.nan) for leaf in model.leaves]
        else:
            self.gradients = before.gradients

    def _run(self) -> None:
        sums = self.model.forward_loss(self.batch)
        sums.loss.backward()
        self.loss.copy_(sums.loss.detach())
        self.correct.copy_(sums.correct)

    def replay(self, between: Callable[[], None]) -> None:
        between()
        assign_gradients(self.model, self.gradients if self.adds else [None] * len(self.gradients))
        self._run()
        if not self.adds:
            for leaf, gradient in zip(self.model.leaves, self.gradients, strict=True):
                if gradient is not None:
                    gradient.copy_(leaf.grad)

    def idle_bytes(self) -> int:
        return 0


class Recorder:
    """Counts recordings: "first" or "adds". The recording number ``fails_at`` fails, on the last rank."""

    def __init__(self, run: Run, *, keep: bool = True, fails_at: int = 0) -> None:
        self.made: list[str] = []
        self._fails_at = fails_at
        run.trainer.model.is_static = True
        self.replays = GraphCache(run.trainer.model, keep=keep, record=self._record)
        assert run.trainer.record_passes(self.replays)

    def _record(self, model: BoundModel, batch: PackedBatch, before: Recomputed | None) -> Recomputed:
        self.made.append("first" if before is None else "adds")
        passes = Recomputed(model, batch, before)
        if len(self.made) == self._fails_at and model.tp.rank == model.tp.size - 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return passes


def compare(tp: TPGroup, folder: Path, lengths: list[tuple[int, ...]], name: str = "qwen3", **options: object) -> list:
    """Train with and without replays; returns what was recorded by each step's end."""
    recorded, plain = (Run(tp, folder, name, GradientMode.stored) for _ in range(2))
    recorder, made = Recorder(recorded, **options), []  # type: ignore[arg-type]
    for step, of_step in enumerate(lengths):
        ours, expected = (
            run.trainer.step(samples(vocab_size=64, seed=step, lengths=of_step)) for run in (recorded, plain)
        )
        assert without_times(ours) == without_times(expected)
        made.append(len(recorder.made))
    assert differing(state(plain), state(recorded)) == []
    return [made, recorder.made]


def _check_replay(tp: TPGroup, folder: Path) -> None:
    for name in ("qwen3", "3 micro-batches, checkpointing, tied", "one KV head", "fused rows replicated in part"):
        assert compare(tp, folder, [SHORT, SHORT, SHORT, TWO, TWO, TWO, TWO], name) == [
            [0, 1, 1, 1, 1, 3, 3], ["first", "first", "adds"],
        ]  # fmt: skip
    # the number of micro-batches may change
    assert compare(tp, folder, [(60,), TWO, TWO, (60,), TWO])[1] == ["first", "adds"]
    # another step in between: what is recorded stays, or makes room
    in_between = [SHORT] * 9 + [LONG] + [SHORT] * 2
    assert compare(tp, folder, in_between) == [[0] + [1] * 11, ["first"]]
    assert compare(tp, folder, in_between, keep=False) == [[0] + [1] * 10 + [2], ["first"] * 2]
    assert compare(tp, folder, [(20, 60), (20, 60)])[1] == [], "two micro-batches that are not alike"


@pytest.mark.parametrize("size", [1, 2])
def test_replayed_steps_train_as_others_do(size: int, checkpoints: Path) -> None:
    run_ranks(_check_replay, size, checkpoints, deadline_seconds=200)


def _check_failure(tp: TPGroup, folder: Path) -> None:
    assert compare(tp, folder, [SHORT, SHORT, SHORT, SHORT], fails_at=1)[1] == ["first"]
    assert compare(tp, folder, [TWO, TWO, TWO, TWO], fails_at=2)[1] == ["first", "adds"]


@pytest.mark.parametrize("size", [1, 2])
def test_work_that_cannot_be_recorded_on_one_rank_runs_as_usual_on_all(size: int, checkpoints: Path) -> None:
    run_ranks(_check_failure, size, checkpoints)


class MappedBuffers(PeerBuffers):
    """Sums through memory of two processes on a CPU."""

    def __init__(self, rank: int, folder: Path, num_bytes: int) -> None:
        self.num_bytes, self._turn = num_bytes, 0
        mine, other = (
            torch.from_file(str(folder / f"rank-{r}"), shared=True, size=2 * num_bytes, dtype=torch.uint8)
            for r in (rank, 1 - rank)
        )
        self._halves = list(zip(mine.split(num_bytes), other.split(num_bytes), strict=True))

    def _meet(self, channel: int) -> None:
        dist.barrier()


def _check_a_broken_recording(tp: TPGroup, folder: Path, sums_before_failure: int) -> list[bool]:
    """Whether each of four sums is right, after a recording of eight in which the last rank failed."""
    tp.peers.buffers = buffers = MappedBuffers(tp.rank, folder, 1024)

    def record(*_: object) -> None:
        for position in range(8):  # nothing runs while CUDA records: the host alone goes through the sums
            if tp.rank and position == sums_before_failure:
                raise RuntimeError("out of memory")
            buffers._next_half(8, 16, torch.float32)

    model = SimpleNamespace(tp=tp, zero_grad=lambda: None)
    replays = GraphCache(model, keep=True, record=record)  # type: ignore[arg-type]
    batches = pack(samples(lengths=SHORT), 64)
    assert [replays.can_replay(batches) for _ in range(3)] == [False] * 3
    right = []
    for _ in range(4):
        a, b = torch.randn(8, 32), torch.randn(32, 16)
        right.append(torch.equal(buffers.sum_product(SumOfProducts([(a, b)]), None), tp.all_reduce_(a @ b)))
    return right


@pytest.mark.parametrize("sums_before_failure", [2, 3])
def test_sums_are_right_after_a_recording_that_one_rank_broke_off(sums_before_failure: int, tmp_path: Path) -> None:
    """The ranks went through different numbers of sums, and their halves of the memory with them."""
    assert run_ranks(_check_a_broken_recording, 2, tmp_path, sums_before_failure) == [[True] * 4] * 2


def _check_rejoin(tp: TPGroup, folder: Path) -> None:
    tp = TPGroup.world("gloo", datetime.timedelta(seconds=60))
    run = Run(tp, folder, "qwen3", GradientMode.stored)
    recorder = Recorder(run)
    for step in range(6):
        if step == 3:
            tp.dissolve()
            assert recorder.replays._passes == [], "NCCL leaves no group that something recorded still uses"
            tp.form("gloo", datetime.timedelta(seconds=60))
        assert not run.trainer.step(samples(vocab_size=64, lengths=SHORT)).skipped
        assert len(recorder.made) == [0, 1, 1, 1, 2, 2][step]
        run.trainer.score(samples(vocab_size=64, lengths=LONG))


def test_a_new_process_group_is_recorded_anew(checkpoints: Path) -> None:
    """Recorded collectives belong to the group that they were recorded with."""
    run_ranks(_check_rejoin, 2, checkpoints)


def test_steps_that_cannot_be_recorded_are_not(checkpoints: Path) -> None:
    """Work that follows from the data, and gradients that are freed in the backward pass."""
    for mode, is_static in ((GradientMode.stored, False), (GradientMode.auto, True)):
        run = Run(TPGroup.single(), checkpoints, "qwen3", mode, CONFIG)
        run.trainer.model.is_static = is_static
        assert not run.trainer.record_passes(GraphCache(run.trainer.model, keep=True))


def test_recordings_that_do_not_pay_become_rare(checkpoints: Path) -> None:
    """Two steps of a structure, two of another, and so on: each would be recorded for one replay."""
    by_turns = [SHORT, SHORT, LONG, LONG, TWO[:1], TWO[:1]] * 3
    assert compare(TPGroup.single(), checkpoints, by_turns, keep=False)[1] == ["first"]
    long_runs = [SHORT] * 12 + [LONG] * 12 + [SHORT] * 3 + [LONG] * 12
    made, kinds = compare(TPGroup.single(), checkpoints, long_runs, keep=False)
    assert kinds == ["first"] * 4
    assert [made.index(n) for n in (1, 2, 3, 4)] == [1, 13, 25, 29], (
        "the last waits for two repeats: SHORT had two replays"
    )
