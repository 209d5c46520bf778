"""Memory profiling runs: they leave no trace, all ranks agree on the plan, and what does not fit is refused on all of them.

A counter stands in for a GPU's allocator: the gradients that live, and ``PER_TOKEN`` bytes for each token of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apollo_tp.config import GradientMode
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import DeviceMemoryError
from apollo_tp.inspect.exactness import samples
from apollo_tp.model import LossSums
from apollo_tp.model.batch import PackedBatch
from apollo_tp.training.memory_plan import MARGIN, MemoryPlan
from apollo_tp.training.memory_profiling import plan_memory
from tests.support.figures import without_times
from tests.support.gradient_runs import CONFIG, ONE_BATCH, SEVERAL, Run, differing, state
from tests.support.ranks import run_ranks

PER_TOKEN = 10_000
PLENTY = 10**12
MODES = (GradientMode.stored, GradientMode.in_backward, GradientMode.auto)
NAMES = ("qwen3", "3 micro-batches, checkpointing, tied", "fused rows replicated in part", "experts and checkpointing")


class Counter:
    """The meter of a device with ``room`` bytes; ``lengths`` are the micro-batches that were run."""

    def __init__(self, run: Run, room: int = PLENTY) -> None:
        self.run, self.room, self.most, self.lengths = run, room, 0, []
        model, forward = run.trainer.model, run.trainer.model.forward_loss

        def forward_loss(batch: PackedBatch) -> LossSums:
            self.lengths.append(batch.num_tokens)
            self.most = self.allocated() + PER_TOKEN * batch.num_tokens
            if self.most > room:
                raise torch.OutOfMemoryError("counted")
            return forward(batch)

        model.forward_loss = forward_loss  # type: ignore[method-assign]

    def allocated(self) -> int:
        return sum(leaf.grad.nbytes for leaf in self.run.leaves if leaf.grad is not None)

    def segment_peak(self) -> int:
        peak, self.most = max(self.most, self.allocated()), 0
        return peak

    def available(self) -> int:
        return self.room - self.allocated()


def _check_profiling(tp: TPGroup, folder: Path, name: str, mode: GradientMode) -> None:
    profiled, plain = Run(tp, folder, name, mode), Run(tp, folder, name, mode)
    optimizer = profiled.trainer.optimizer
    for lengths in (ONE_BATCH, ONE_BATCH if mode is GradientMode.in_backward else SEVERAL):
        before, skipped = state(profiled), optimizer.skipped_in_a_row
        counter = Counter(profiled)
        plan = plan_memory(profiled.trainer, counter, max_sequence_tokens=20)
        assert differing(before, state(profiled)) == []
        assert (optimizer.step_count, optimizer.skipped_in_a_row) == (plain.trainer.optimizer.step_count, skipped)
        assert all(leaf.grad is None for leaf in profiled.leaves)
        assert set(counter.lengths) == {16, 32, 64}
        assert plan.tokens == plan.largest == 64
        beside = (
            0 if mode is GradientMode.in_backward else plan.gradients
        )  # an in-backward step begins without gradients
        assert plan.gradients + plan.activations == beside + 64 * PER_TOKEN
        results = [run.trainer.step(samples(vocab_size=64, lengths=lengths)) for run in (profiled, plain)]
        assert without_times(results[0]) == without_times(results[1])
        assert differing(state(plain), state(profiled)) == []
        assert differing(before, state(profiled)), "the step after it trains"
    whole = sum(leaf.nbytes for leaf in profiled.leaves)
    if plan.rank == tp.rank:
        assert plan.gradients < whole if mode is GradientMode.in_backward else plan.gradients == whole


def _check_all_profilings(tp: TPGroup, folder: Path) -> None:
    for name in NAMES:
        for mode in MODES:
            _check_profiling(tp, folder, name, mode)


@pytest.mark.parametrize("size", [1, 2])
def test_a_profiling_run_leaves_no_trace(size: int, checkpoints: Path) -> None:
    """Weights, moments and counters keep their bits, and later steps are those of a trainer that was never profiled."""
    run_ranks(_check_all_profilings, size, checkpoints, deadline_seconds=280)


def _check_lack(tp: TPGroup, folder: Path) -> tuple[str, list[int]]:
    run = Run(tp, folder, "qwen3", GradientMode.stored, replace(CONFIG, max_grad_norm=1.0))
    run.trainer.max_micro_batch_tokens = 1 << 20
    before = state(run)
    gradients = sum(leaf.nbytes for leaf in run.leaves)
    counter = Counter(run, gradients + 3000 * PER_TOKEN if tp.rank == tp.size - 1 else PLENTY)
    with pytest.raises(DeviceMemoryError) as refused:
        plan_memory(run.trainer, counter, max_sequence_tokens=64, max_first_tokens=256)
    assert differing(before, state(run)) == []
    return str(refused.value), counter.lengths


@pytest.mark.parametrize("size", [1, 2])
def test_too_little_room_on_one_rank_is_refused_on_all_before_it_is_needed(size: int, checkpoints: Path) -> None:
    """The same words everywhere: whose need, how much, and how many tokens would fit. The long micro-batch never runs."""
    results = run_ranks(_check_lack, size, checkpoints)
    text, lengths = results[0]
    assert all(result == results[0] for result in results)
    assert text.startswith(f"rank {size - 1}: got 0.03 GB free on its GPU, expected ")
    assert "train.max_micro_batch_tokens=1048576" in text
    fitting = int(text.partition("lower train.max_micro_batch_tokens to ")[2].partition(",")[0])
    assert fitting == pytest.approx(3000 / (1 + MARGIN), rel=0.02)
    assert max(lengths) == 1024


def _check_no_room_for_gradients(tp: TPGroup, folder: Path) -> list[int]:
    run = Run(tp, folder, "experts and checkpointing", GradientMode.stored)
    counter = Counter(run, room=1000)
    with pytest.raises(DeviceMemoryError, match=r"got 0\.00 GB free") as refused:
        plan_memory(run.trainer, counter, max_sequence_tokens=64)
    assert "gradient_checkpointing" not in str(refused.value), "it is on already"
    return counter.lengths


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_that_do_not_fit_are_refused_without_a_profiling_run(size: int, checkpoints: Path) -> None:
    assert run_ranks(_check_no_room_for_gradients, size, checkpoints) == [[]] * size


def _check_running_out(tp: TPGroup, folder: Path) -> str:
    run = Run(tp, folder, "qwen3", GradientMode.stored)
    gradients = sum(leaf.nbytes for leaf in run.leaves)
    counter = Counter(run, room=int(1.06 * gradients) + (40 * PER_TOKEN if tp.rank == tp.size - 1 else PLENTY))
    error: type[Exception] = DeviceMemoryError if tp.rank == tp.size - 1 else RuntimeError
    with pytest.raises(error) as refused:
        plan_memory(run.trainer, counter, max_sequence_tokens=64)
    if error is DeviceMemoryError:  # from the trials of 16 and 32 tokens
        fits = int((counter.room / (1 + MARGIN) - gradients) / PER_TOKEN)
        assert 32 < fits < counter.lengths[-1]
        assert f"; lower it to {fits}, which would fit, " in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("size", [1, 2])
def test_a_profiling_run_that_runs_out_of_memory_is_a_refusal_and_wakes_the_others(
    size: int, checkpoints: Path
) -> None:
    text = run_ranks(_check_running_out, size, checkpoints, deadline_seconds=60)[-1]
    assert f"rank {size - 1}: got an out-of-memory error from a trial micro-batch of" in text
    assert "train.gradient_checkpointing=true" in text


def _slope_that_shows_late(tp: TPGroup, folder: Path) -> tuple[MemoryPlan, list[int]]:
    """Memory that is flat up to 60 tokens on rank 0."""
    run = Run(tp, folder, "qwen3", GradientMode.in_backward)
    counter = Counter(run)
    if tp.rank == 0:
        counter.segment_peak = lambda: max([60, *counter.lengths[-1:]]) * PER_TOKEN  # type: ignore[method-assign]
    run.trainer.max_micro_batch_tokens = 640
    plan = plan_memory(run.trainer, counter, max_sequence_tokens=64, max_first_tokens=16)
    return plan, counter.lengths


@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_go_on_to_longer_lengths_until_the_line_is_straight_on_each(size: int, checkpoints: Path) -> None:
    (plan, lengths), *others = run_ranks(_slope_that_shows_late, size, checkpoints)
    assert lengths == [16, 16, 32, 64, 128, 256]
    assert plan.gradients + plan.activations == pytest.approx(640 * PER_TOKEN, rel=0.01)
    assert all(other == (plan, lengths) for other in others)
