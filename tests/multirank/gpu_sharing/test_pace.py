"""A paced trainer over several ranks: the same bits as an unpaced one, and ranks that sleep alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from apollo_tp.config import GradientMode, OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.gpu_sharing.pace import Pace
from apollo_tp.inspect.exactness import map_copy, samples
from apollo_tp.model import bind_model
from apollo_tp.optim import Optimizer
from apollo_tp.training.trainer import Trainer
from tests.support.families import CASES
from tests.support.ranks import run_ranks

CONFIG = OptimConfig(rank=8, lr=1e-3, max_relative_update=1.0, max_grad_norm=None)
LENGTHS = {GradientMode.stored: (60, 58), GradientMode.in_backward: (20, 11, 17)}
"""Two micro-batches, and the one that a step in backward takes."""


def _two_steps(tp: TPGroup, folder: Path, name: str, mode: GradientMode, share: float) -> tuple[dict, list[float]]:
    """Weights afterwards, and what was slept (nobody really sleeps here)."""
    case = CASES[name]
    tensors = map_copy(folder / case.checkpoint, tp).tensors
    config = AutoConfig.from_pretrained(folder / case.checkpoint)
    model = bind_model(config, tensors, tp, gradient_checkpointing=case.gradient_checkpointing)
    slept: list[float] = []
    cpu = torch.device("cpu")
    trainer = Trainer(
        model,
        Optimizer(CONFIG, Precision.remainder, model.parameters, tp),
        tp,
        device=cpu,
        max_micro_batch_tokens=64,
        gradients=mode,
        pace=Pace(share, model.module, tp, cpu, sleep=slept.append),
    )
    for seed in range(2):
        assert trainer.step(samples(seed=seed, lengths=LENGTHS[mode])).skipped == ""
    return {key: local.numpy().copy() for key, (_, local) in tensors.items()}, slept


def _difference(tp: TPGroup, folder: Path, name: str, mode: GradientMode) -> tuple[list[str], list[float]]:
    plain, nothing = _two_steps(tp, folder, name, mode, 1.0)
    paced, slept = _two_steps(tp, folder, name, mode, 0.5)
    assert nothing == []
    return [key for key, value in plain.items() if value.tobytes() != paced[key].tobytes()], slept


@pytest.mark.parametrize("mode", [GradientMode.stored, GradientMode.in_backward])
@pytest.mark.parametrize("name", ["qwen3", "3 micro-batches, checkpointing, tied"])
@pytest.mark.parametrize("size", [1, 2])
def test_pace_changes_no_bit(size: int, name: str, mode: GradientMode, checkpoints: Path) -> None:
    """Stored and in backward, with and without recomputation; and every layer of every micro-batch had its sleep."""
    results = run_ranks(_difference, size, checkpoints, name, mode)
    micro_batches, layers = len(LENGTHS[GradientMode.stored]) if mode is GradientMode.stored else 1, 2
    for differing, slept in results:
        assert differing == []
        # per micro-batch: each layer in both directions, the head, the end; then the optimizer; more with recomputation
        assert len(slept) >= 2 * (micro_batches * (2 * layers + 2) + 1)
        assert min(slept) > 0
        assert slept == results[0][1]


@dataclass
class _Clock:
    """Rank r works r + 1 seconds, then sleeps."""

    rank: int
    now: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def _uneven_bursts(tp: TPGroup) -> list[float]:
    clock = _Clock(tp.rank)
    pace = Pace(0.25, nn.Module(), tp, torch.device("cpu"), clock=lambda: clock.now, sleep=clock.sleep)
    pauses = []
    for _ in range(3):
        clock.now += 1 + tp.rank
        before = clock.now
        pace.give_way()
        pauses.append(clock.now - before)
    return pauses


def test_all_ranks_sleep_for_the_shortest_burst() -> None:
    """A rank's longer burst is its wait for the others: to sleep for it would make it the one that is waited for."""
    assert run_ranks(_uneven_bursts, 2) == [[3.0] * 3] * 2
