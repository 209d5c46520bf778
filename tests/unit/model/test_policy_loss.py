"""Losses over sampled tokens: TRL's numbers for the same tensors, and what bounds and masks do to single tokens."""

from __future__ import annotations

import json

import pytest
import torch

from apollo_tp.model import policy_loss
from apollo_tp.model.policy_loss import Tokens
from apollo_tp.training.objectives import NothingToLearnError, shares
from apollo_tp.wire.losses import LossConfig, complete
from tests.support import trl_losses
from tests.support.policy_twin import loss_of


def _tokens(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, **changes: object) -> Tokens:
    """Tokens of one sequence each, unless ``changes`` say otherwise."""
    zeros = torch.zeros_like(new)
    options: dict = {
        "reference": zeros, "teacher": zeros, "sequence": torch.arange(len(new)), "num_sequences": len(new),
        "learned": torch.ones_like(new, dtype=torch.bool), "baseline": torch.zeros(()),
    }  # fmt: skip
    return Tokens(new=new, old=old, advantages=advantages, **(options | changes))


@pytest.mark.parametrize("name", trl_losses.CASES)
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    """TRL 1.16's own code made the numbers (tests/support/trl_losses.py). KTO's baseline is that of the batch itself."""
    case, given = trl_losses.CASES[name], trl_losses.inputs()
    loss = complete(case["loss"], LossConfig(**case["loss_config"]))
    kept = torch.tensor([[t < length for t in range(trl_losses.WIDTH)] for length in trl_losses.LENGTHS])
    lists = {key: torch.tensor(given[key], dtype=torch.float64)[kept] for key in ("new", "old", "reference")}
    sequence = torch.arange(len(kept)).repeat_interleave(torch.tensor(trl_losses.LENGTHS))
    new = lists["new"].requires_grad_()
    tokens = _tokens(
        new, lists["old"], torch.tensor(given["advantages"], dtype=torch.float64)[sequence],
        reference=lists["reference"], sequence=sequence, num_sequences=len(kept),
    )  # fmt: skip
    if name == "kto":
        tokens.baseline.fill_(policy_loss.sequence_logratios(tokens).detach().mean().clamp(min=0))
    factors = torch.tensor(shares([float(length) for length in trl_losses.LENGTHS], loss.config), dtype=torch.float64)
    total = (factors[sequence] * policy_loss.token_losses(tokens, loss)).sum()
    total.backward()
    expected = json.loads(trl_losses.PATH.read_text())[name]
    assert total.item() == pytest.approx(expected["loss"], rel=1e-6)
    torch.testing.assert_close(
        new.grad, torch.tensor(expected["gradient"], dtype=torch.float64)[kept], rtol=1e-6, atol=1e-9
    )


def test_which_tokens_are_clipped() -> None:
    """A ratio of 2 and one of 1/2, each with an advantage of either sign: ppo clips where it would go further."""
    new = torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    tokens = _tokens(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert policy_loss.clipped(tokens, loss_of("ppo")).tolist() == [True, False, False, True]
    assert policy_loss.clipped(tokens, loss_of("gspo")).tolist() == [True, False, False, True]
    assert policy_loss.clipped(tokens, loss_of("cispo", clip_high=0.5)).tolist() == [True, True, False, False]
    assert policy_loss.clipped(tokens, loss_of("importance_sampling", is_cap=1.5)).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert not policy_loss.clipped(tokens, loss_of("importance_sampling")).any()


def test_a_token_that_has_become_impossible_stays_finite() -> None:
    """Its ratio would overflow, or be 0 and then NaN in a product."""
    new = torch.tensor([-0.1, -200.0], requires_grad=True)
    tokens = _tokens(new, torch.tensor([-300.0, -0.1]), torch.tensor([-1.0, 1.0]))
    for name in ("importance_sampling", "ppo", "cispo", "gspo", "distill"):
        total = policy_loss.token_losses(tokens, loss_of(name)).sum()
        (gradient,) = torch.autograd.grad(total, new)
        assert torch.isfinite(total), name
        assert torch.isfinite(gradient).all(), name


def test_shares_are_of_what_is_left() -> None:
    assert shares([2.0, 0.0, 6.0], loss_of("ppo").config) == [1 / 8] * 3
    assert shares([2.0, 0.0, 6.0], loss_of("gspo").config) == [1 / 4, 0.0, 1 / 12]
    assert shares([2.0, 0.0], loss_of("ppo", normalisation="constant", divisor=5.0).config) == [1 / 5] * 2
    with pytest.raises(NothingToLearnError, match="none of 2 samples"):
        shares([0.0, 0.0], loss_of("ppo").config)
