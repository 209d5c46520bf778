"""Steps of losses over sampled tokens, against their plain twins: TP = 1, 2 and 4, and two replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_tp.config import GradientMode
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import local_part, relative_error, samples
from apollo_tp.wire.commands import Sample
from tests.support import policy_twin
from tests.support.families import CASES
from tests.support.ranks import run_ranks
from tests.support.trainers import CASE, CONFIG, make_trainer

STILL = replace(CONFIG, lr=1e-30)
"""Weights do not move, so that every loss sees the same ones."""


@pytest.fixture(scope="module")
def twins(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], Path]:
    """The samples, and the file of each case's loss, figures and gradients."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints / CASES[CASE].checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    batch = policy_twin.sampled_batch(model)
    results = {}
    for name, loss in policy_twin.CASES.items():
        model.zero_grad()
        total, figures = policy_twin.loss_and_figures(model, batch, loss)
        total.backward()
        results[name] = total.item(), figures, {n: p.grad.clone() for n, p in model.named_parameters()}
    path = tmp_path_factory.mktemp("twins") / "results.pt"
    torch.save(results, path)
    return batch, path


def _errors(world: TPGroup, tp_size: int, checkpoint: Path, batch: list[Sample], path: Path) -> dict[str, float]:
    """Relative errors of each case's loss, figures and gradients."""
    mesh, expected = Mesh.build(world, tp_size), torch.load(path)
    trainer, _ = make_trainer(mesh.tp, checkpoint, STILL, mesh)
    errors: dict[str, float] = {}
    for case, loss in policy_twin.CASES.items():
        total, figures, gradients = expected[case]

        def compare_gradients(case: str = case, gradients: dict = gradients) -> None:
            for p in trainer.model.parameters:
                whole = gradients[p.name]
                own = torch.zeros(p.tensor.shape) if p.grad is None else p.grad.clone()
                part = local_part(whole, p.shard)
                errors[f"{case}: {p.name}"] = relative_error(mesh.replicas.all_reduce_(own), part, whole)

        trainer._before_write = compare_gradients
        got = trainer.step(batch, loss=loss)
        assert got.skipped == "", got.skipped
        errors[f"{case}: loss"] = abs(got.loss - total) / max(abs(total), 1.0)  # terms of about 1 cancel
        for name, value in figures.items() if loss.name != "cross_entropy" else ():
            errors[f"{case}: {name}"] = abs(got.metrics[name] - value) / max(abs(value), 1.0)
    return errors


@pytest.mark.parametrize(("num_replicas", "tp_size"), [(1, 1), (1, 2), (1, 4), (2, 2)])
def test_losses_figures_and_gradients_equal_the_plain_twins(
    num_replicas: int, tp_size: int, checkpoints: Path, twins: tuple[list[Sample], Path]
) -> None:
    """fp32; sums over ranks, replicas and micro-batches are in another order."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    for rank, errors in enumerate(
        run_ranks(_errors, num_replicas * tp_size, tp_size, checkpoint, *twins, deadline_seconds=280)
    ):
        wrong = {name: error for name, error in errors.items() if not error < 1e-5}
        assert not wrong, f"rank {rank}: {wrong}"


def test_the_twins_tell_cases_apart(twins: tuple[list[Sample], Path]) -> None:
    """Bounds and masks are met: otherwise a loss without them would pass."""
    results = torch.load(twins[1])
    for case in ("masked tokens", "masked sequences", "ppo, masked", "gspo, masked", "distill"):
        assert 0.05 < results[case][1]["masked_share"] < 0.9, case
    assert len({round(total, 6) for total, _, _ in results.values()}) == len(results)


def test_stale_samples_are_dropped_and_counted(checkpoints: Path) -> None:
    """The others alone are learned from; of stale ones alone nothing is, and the weights stay."""
    import msgspec

    trainer, tensors = make_trainer(TPGroup.single(), checkpoints / CASES[CASE].checkpoint)
    trainer.weight_version = 10
    ages = (0, 2, 3, 9, None, 2, 8)
    batch = [
        msgspec.structs.replace(
            s, sampled=msgspec.structs.replace(s.sampled, weight_version=None if a is None else 10 - a)
        )
        for s, a in zip(samples(), ages, strict=True)
    ]
    figures = trainer.step(batch, 1e-6, max_staleness=2)
    fresh = [s for s, a in zip(batch, ages, strict=True) if a is None or a <= 2]
    assert figures.metrics["stale_samples"] == 3
    assert figures.num_tokens == sum(len(s.token_ids) for s in fresh)
    alone, _ = make_trainer(TPGroup.single(), checkpoints / CASES[CASE].checkpoint)
    assert figures.loss == pytest.approx(alone.step(fresh).loss, rel=1e-6)

    before = {name: tensor.clone() for name, (_, tensor) in tensors.items()}
    nothing = trainer.step([batch[3], batch[6]], max_staleness=2)
    assert nothing.skipped == "none of 0 samples has a token to learn from, 2 stale ones not counted"
    assert (nothing.weight_version, nothing.metrics) == (11, {"stale_samples": 2.0})
    assert all(torch.equal(before[name], tensor) for name, (_, tensor) in tensors.items())
    assert trainer.step(fresh, max_staleness=None).metrics == {}


def _scored(tp: TPGroup, checkpoint: Path, batch: list[Sample]) -> list[list[float]]:
    trainer, _ = make_trainer(tp, checkpoint)
    return trainer.score(batch).token_logprobs


@pytest.mark.parametrize("size", [1, 2])
def test_scores_of_tokens_are_those_at_the_samples_temperature(size: int, checkpoints: Path) -> None:
    """Several micro-batches; one value per token, 0 where nothing is learned."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    batch = policy_twin.sampled_batch(model)
    with torch.no_grad():
        expected = [sequence.new for sequence in policy_twin.sequences(model, batch, False)]
    for found in run_ranks(_scored, size, checkpoint, batch):
        for sample, got, of_learned in zip(batch, found, expected, strict=True):
            values = torch.tensor(got)
            learned = torch.tensor(sample.weights) != 0
            torch.testing.assert_close(values[learned], of_learned, rtol=0, atol=1e-5)
            assert not values[~learned].any()


def test_a_masked_step_in_the_backward_pass_is_the_stored_one(
    checkpoints: Path, twins: tuple[list[Sample], Path]
) -> None:
    """Bit for bit: denominators are known before the first matrix is written."""
    batch = [sample for sample in twins[0] if len(sample.token_ids) < 30][:3]
    ends = []
    for mode in (GradientMode.auto, GradientMode.stored):
        trainer, tensors = make_trainer(
            TPGroup.single(), checkpoints / CASES[CASE].checkpoint, replace(CONFIG, max_grad_norm=None)
        )
        trainer.gradients = mode
        figures = trainer.step(batch, loss=policy_twin.CASES["masked tokens"])
        assert figures.gradients == ("stored" if mode is GradientMode.stored else "in_backward")
        assert 0 < figures.metrics["masked_share"] < 1
        ends.append({name: tensor.clone() for name, (_, tensor) in tensors.items()})
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())
