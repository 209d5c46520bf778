"""The trainer's gradient modes: what a step writes does not depend on the mode, only how much gradient memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apollo_tp.config import GradientMode
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError
from apollo_tp.inspect.exactness import samples
from tests.support.gradient_runs import CONFIG, ONE_BATCH, SEVERAL, Run, differing
from tests.support.ranks import run_ranks

STEPS = 4
CHECKED = (
    "qwen3",
    "checkpointing",
    "3 micro-batches, checkpointing, tied",
    "a rank without vocabulary rows",
    "one KV head",
    "fused rows replicated in part",
    "experts and checkpointing",
)
"""Replicas whole and in part, stacked leaves, a gradient of two uses, an empty shard, recomputation."""


def _train(tp: TPGroup, folder: Path, name: str, mode: GradientMode, lengths: Callable[[int], tuple]) -> tuple:
    run = Run(tp, folder, name, mode)
    start, modes, norms = run.values(), [], []
    for step in range(STEPS):
        result = run.trainer.step(samples(vocab_size=64, seed=step, lengths=lengths(step)))
        assert result.skipped == ""
        modes.append(result.gradients)
        norms.append(result.grad_norm)
    assert len(differing(start, run.values())) > len(start) / 2
    return run.values(), modes, norms, run.peak


def _compare(tp: TPGroup, folder: Path) -> list[str]:
    """What is wrong, over all cases."""
    wrong = []
    for name in CHECKED:
        stored, modes, norms, peak = _train(tp, folder, name, GradientMode.stored, lambda step: ONE_BATCH)
        values, early_modes, fused_norms, early_peak = _train(
            tp, folder, name, GradientMode.in_backward, lambda step: ONE_BATCH
        )
        wrong += [f"{name}: {tensor} differs" for tensor in differing(stored, values)]
        if (set(modes), set(early_modes)) != ({"stored"}, {"in_backward"}):
            wrong.append(f"{name}: stored ran as {modes}, in backward as {early_modes}")
        if fused_norms != pytest.approx(norms, rel=1e-5):
            wrong.append(f"{name}: norms {norms} and {fused_norms}")
        if not early_peak < peak:
            wrong.append(f"{name}: {early_peak} bytes of gradients in backward, {peak} stored")
    return wrong


@pytest.mark.parametrize("size", [1, 2])
def test_fused_steps_write_what_stored_steps_write(size: int, checkpoints: Path) -> None:
    """The same bits: sums of two ranks commute, and each matrix is projected by itself. Gradient memory is smaller."""
    for rank, wrong in enumerate(run_ranks(_compare, size, checkpoints, deadline_seconds=280)):
        assert not wrong, f"rank {rank}: {wrong}"


def _check_choice(tp: TPGroup, folder: Path) -> None:
    by_turns = [ONE_BATCH, SEVERAL]
    auto, modes, _, _ = _train(tp, folder, "one KV head", GradientMode.auto, lambda step: by_turns[step % 2])
    stored, stored_modes, _, _ = _train(tp, folder, "one KV head", GradientMode.stored, lambda step: by_turns[step % 2])
    assert modes == ["in_backward", "stored"] * (STEPS // 2)
    assert set(stored_modes) == {"stored"}
    assert differing(auto, stored) == []
    clipping = Run(tp, folder, "qwen3", GradientMode.auto, replace(CONFIG, max_grad_norm=1.0))
    assert clipping.trainer.gradients is GradientMode.stored
    assert clipping.trainer.step(samples(lengths=ONE_BATCH)).gradients == "stored"
    with pytest.raises(ConfigError, match=r"optim\.max_grad_norm: got 1\.0, expected null"):
        Run(tp, folder, "qwen3", GradientMode.in_backward, replace(CONFIG, max_grad_norm=1.0))


@pytest.mark.parametrize("size", [1, 2])
def test_auto_chooses_for_each_step(size: int, checkpoints: Path) -> None:
    """Fused where nothing is lost, one micro-batch and no clipping; moments and counters are those of stored steps."""
    run_ranks(_check_choice, size, checkpoints)


def _check_refusal(tp: TPGroup, folder: Path) -> None:
    calls: list[list[str]] = []
    run = Run(
        tp, folder, "qwen3", GradientMode.in_backward, before_write=lambda: calls.append(differing(start, run.values()))
    )
    start = run.values()
    with pytest.raises(ConfigError, match=r"118 tokens in 2 micro-batches, expected one .* train\.gradients=auto"):
        run.trainer.step(samples(lengths=SEVERAL))
    assert (differing(start, run.values()), calls, run.trainer.weight_version) == ([], [], 0)
    assert run.trainer.step(samples(lengths=ONE_BATCH)).skipped == ""
    assert calls == [[]], "before_write is called once, before the first write"
    assert differing(start, run.values())


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_cannot_be_fused_is_refused_before_anything_is_written(size: int, checkpoints: Path) -> None:
    run_ranks(_check_refusal, size, checkpoints)


def _check_poisoned(tp: TPGroup, folder: Path) -> list[str]:
    run = Run(tp, folder, "qwen3", GradientMode.in_backward)
    name = "model.layers.0.mlp.down_proj.weight"
    start = run.values()
    handle = run.leaf(name).register_hook(lambda grad: grad * float("nan") if tp.rank == tp.size - 1 else grad)
    first = run.trainer.step(samples(lengths=ONE_BATCH))
    handle.remove()
    written = differing(start, run.values())
    assert first.skipped == (
        f"not finite: gradient of {name} on rank {tp.size - 1}; {len(written)} tensors were written"
    )
    assert (first.num_updated, first.weight_version) == (len(written), 1), "the served weights did change"
    assert all(torch.isfinite(value).all() for value in run.values().values())
    second = run.trainer.step(samples(lengths=ONE_BATCH, seed=2))
    assert (second.skipped, second.weight_version) == ("", 2)
    before = run.values()
    run.leaf("model.norm.weight").data.fill_(float("nan"))
    third = run.trainer.step(samples(lengths=ONE_BATCH))
    assert (third.skipped.partition(";")[2], third.weight_version) == (" nothing was written", 2)
    assert differing(before, run.values()) == ["model.norm.weight"]
    return written


@pytest.mark.parametrize("size", [1, 2])
def test_a_value_that_is_not_finite_stops_a_fused_step(size: int, checkpoints: Path) -> None:
    """Layer 1, written before it in the backward pass, stays; the matrix, layer 0's others and AdamW's wait. A loss that is
    not finite stops everything."""
    for written in run_ranks(_check_poisoned, size, checkpoints):
        assert "lm_head.weight" in written
        assert all("layers.1." in name or name == "lm_head.weight" for name in written), written


def _check_raise_half_way(tp: TPGroup, folder: Path, mode: GradientMode) -> tuple[int, int]:
    """(weight version after a step that raised in its backward pass and was abandoned, tensors that it changed)."""
    run = Run(tp, folder, "qwen3", mode)
    start = run.values()

    def fail(grad: Tensor) -> None:
        raise RuntimeError("half way")

    handle = run.leaf("model.layers.0.mlp.down_proj.weight").register_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        run.trainer.step(samples(lengths=ONE_BATCH))
    handle.remove()
    run.trainer.abandon_step()
    optimizer, written = run.trainer.optimizer, differing(start, run.values())
    version, changed = run.trainer.weight_version, len(written)
    counted = [name for name, count in zip(optimizer.names, optimizer.update_group.steps, strict=True) if count]
    assert sorted(counted) == sorted(written), "their moments have moved: the next update is their second"
    assert all(leaf.grad is None for leaf in run.leaves)
    following = run.trainer.step(samples(lengths=ONE_BATCH))
    assert (following.skipped, following.weight_version) == ("", version + 1)
    return version, changed


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_raises_counts_if_it_has_written(size: int, checkpoints: Path) -> None:
    """It has written the layers above the one that raised: caches of the old weights must not outlive that."""
    for version, changed in run_ranks(_check_raise_half_way, size, checkpoints, GradientMode.in_backward):
        assert version == 1
        assert changed
    for version, changed in run_ranks(_check_raise_half_way, size, checkpoints, GradientMode.stored):
        assert (version, changed) == (0, 0)
