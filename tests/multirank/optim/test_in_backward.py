"""Updates inside the backward pass against updates from stored gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apollo_tp.config import Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ApolloTpError, ConfigError
from apollo_tp.optim import Optimizer, in_backward
from tests.support import optim_model as model
from tests.support.optim_model import loss_of
from tests.support.ranks import run_ranks

STEPS = 7
STORED = {  # matrices that ranks hold replicas of, in whole or in part: their gradients may still have to be summed
    1: set(),
    2: {"router.weight", "qkv_tall.weight"},
    4: {"router.weight", "qkv_tall.weight", "qkv_wide.weight", "k_proj.weight", "k_tall.weight"},
}


def train(tp: TPGroup, in_backward_at: Callable[[int], bool] | None) -> tuple[dict, list]:
    """Weights and outcomes after STEPS steps, of which those with ``in_backward_at(step)`` update in backward."""
    params = model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(model.config(max_grad_norm=None), Precision.remainder, params, tp)
    names = optimizer.attach_in_backward() if in_backward_at else []
    outcomes = []
    for step in range(STEPS):
        loss = loss_of(params, model.gradients(step)).detach()
        early = in_backward_at is not None and in_backward_at(step)
        if early:
            optimizer.begin_step_in_backward(loss=loss)
        loss_of(params, model.gradients(step)).backward()
        assert all((p.tensor.grad is None) == (early and p.name in names) for p in params)
        outcomes.append(optimizer.step(loss=loss))
        optimizer.zero_grad()
    if in_backward_at:
        projected = {spec.name for spec in model.SPECS if spec.role != "other" and min(spec.shape) > 8}
        assert set(names) == projected - STORED[tp.size]
    return model.local_values(params), outcomes


def every_way(tp: TPGroup, bucket_bytes: int) -> tuple:
    """Fused, stored, and each by turns: the mode may change from step to step, also in the middle of an interval."""
    in_backward.BUCKET_BYTES = bucket_bytes
    return train(tp, lambda step: True), train(tp, lambda step: step % 3 != 1), train(tp, None)


@pytest.mark.parametrize("bucket_bytes", [1, 10_000, in_backward.BUCKET_BYTES], ids=["leaf", "several", "all"])
@pytest.mark.parametrize("size", [1, 2])
def test_fused_updates_are_the_stored_ones(size, bucket_bytes):
    """The same bits (sums of at most two ranks commute), the same outcomes, and no gradient is left after backward."""
    for *others, (stored, outcomes) in run_ranks(every_way, size, bucket_bytes):
        for values, fused_outcomes in others:
            for name, value in stored.items():
                assert (values[name] == value).all(), name
            for mine, theirs in zip(fused_outcomes, outcomes, strict=True):
                assert mine.num_updated == theirs.num_updated
                assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
                assert mine.largest_update == pytest.approx(theirs.largest_update, rel=1e-6)


def at_four(tp: TPGroup) -> tuple:
    return train(tp, lambda step: True), train(tp, None)


def test_fused_updates_are_the_stored_ones_at_four_ranks():
    """Sums of four ranks may be taken in another order when buckets are cut otherwise: fp32 rounding, then bf16's."""
    for (values, _), (stored, _) in run_ranks(at_four, 4):
        for name, value in stored.items():
            assert torch.allclose(torch.as_tensor(values[name]), torch.as_tensor(value), rtol=2**-7, atol=1e-5), name


def _check_poisoned(tp: TPGroup) -> tuple[str, str, int]:
    """A NaN in one matrix on rank 1, then in the loss only; all other ranks must stop where it appears."""
    in_backward.BUCKET_BYTES = 1
    params = model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(model.config(max_grad_norm=None), Precision.remainder, params, tp)
    optimizer.attach_in_backward()
    whole = model.gradients(0)
    if tp.rank == 1:
        whole["square_row.weight"] = whole["square_row.weight"] * float("nan")
    before = {p.name: p.tensor.detach().clone() for p in params}
    optimizer.begin_step_in_backward(loss=torch.tensor(1.0))
    loss_of(params, whole).backward()
    first = optimizer.step(loss=torch.tensor(1.0))
    changed = sum(not torch.equal(before[p.name], p.tensor.detach()) for p in params if p.tensor.numel())
    assert torch.isfinite(torch.cat([p.tensor.detach().flatten() for p in params])).all()
    optimizer.zero_grad()
    before = {p.name: p.tensor.detach().clone() for p in params}
    optimizer.begin_step_in_backward(loss=torch.tensor(float("nan") if tp.rank == 0 else 1.0))
    loss_of(params, model.gradients(0)).backward()
    second = optimizer.step(loss=torch.tensor(float("nan") if tp.rank == 0 else 1.0))
    assert all(torch.equal(before[p.name], p.tensor.detach()) for p in params)
    assert second.skipped_in_a_row == 2
    optimizer.zero_grad()
    optimizer.begin_step_in_backward()
    optimizer.zero_grad()  # given up: the next step is a stored one, which leaves no trace if it is skipped
    loss_of(params, whole).backward()
    third = optimizer.step()
    assert third.skipped.endswith("nothing was written")
    assert all(torch.equal(before[p.name], p.tensor.detach()) for p in params)
    return first.skipped, second.skipped, changed


def test_a_value_that_is_not_finite_stops_the_rest_of_a_fused_step():
    """It is never written; matrices before it are, and the message counts them; a bad loss stops everything."""
    results = run_ranks(_check_poisoned, 2)
    assert len(set(results)) == 1
    first, second, changed = results[0]
    assert first == f"not finite: gradient of square_row.weight on rank 1; {changed} tensors were written"
    assert 0 < changed < len(model.SPECS) - 1
    assert second == "not finite: loss on rank 0; nothing was written"


def test_misuse_is_refused():
    """Clipping and a second backward pass are refused with what to do."""
    params = model.parameters(TPGroup.single())
    with pytest.raises(ConfigError, match=r"optim\.max_grad_norm: got 1\.0, expected null"):
        Optimizer(model.config(), Precision.remainder, params, TPGroup.single()).attach_in_backward()
    optimizer = Optimizer(model.config(max_grad_norm=None), Precision.remainder, params, TPGroup.single())
    with pytest.raises(ApolloTpError, match="call attach_in_backward first"):
        optimizer.begin_step_in_backward()
    optimizer.attach_in_backward()
    optimizer.begin_step_in_backward()
    loss_of(params, model.gradients(0)).backward()
    with pytest.raises(ApolloTpError, match="a second gradient within a step that updates in the backward pass"):
        loss_of(params, model.gradients(0)).backward()
