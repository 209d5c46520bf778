"""Every family over the layout of real vLLM's loader: loss, log-probabilities and every gradient equal the single-process
Hugging Face model at TP = 1, 2 and 4."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import map_copy, samples
from apollo_tp.model import bind_model
from apollo_tp.model.batch import pack
from apollo_tp.model.build import as_served
from tests.support.exactness import Results, run_cases
from tests.support.families import CASES, FAMILIES, SIZES
from tests.support.ranks import run_ranks


@functools.cache
def _results(folder: Path, size: int) -> Results:
    return run_ranks(run_cases, size, folder, deadline_seconds=280)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_the_single_process_model(name: str, size: int, checkpoints: Path) -> None:
    """fp32; the sums over heads, columns and vocabulary run in another order, hence a tolerance."""
    for rank, results in enumerate(_results(checkpoints, size)):
        errors = results.get(name, "not run: an earlier case failed")
        assert not isinstance(errors, str), errors
        wrong = {tensor: error for tensor, error in errors.items() if not error <= CASES[name].tolerance}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize(("family", "window"), [("cohere2", 9), ("mistral-window", None)])
def test_a_window_is_as_wide_as_the_servers(family: str, window: int | None, checkpoints: Path) -> None:
    """vLLM's layers of Cohere 2 see one token more than those of transformers: the manifest says so, and the trainer takes
    it from there."""
    tp = TPGroup.single()
    mapped = map_copy(checkpoints / family, tp)
    overrides = mapped.manifest.config_overrides
    assert overrides == ({} if window is None else {"sliding_window": window})
    bound = bind_model(as_served(FAMILIES[family].config(), overrides, 0), mapped.tensors, tp)
    assert bound.attention_window == (window or 8)


@pytest.mark.parametrize("family", ["glm4-moe", "dots1"])
def test_what_is_not_trained_is_what_the_server_computes_with(family: str, checkpoints: Path) -> None:
    """A router's correction of its choice is a view of served memory, in vLLM's own model and where vLLM has it in a buffer:
    a change of it is seen, and nothing is trained from it."""
    tp, name = TPGroup.single(), "model.layers.1.mlp.gate.e_score_correction_bias"
    mapped = map_copy(checkpoints / family, tp)
    bound = bind_model(FAMILIES[family].config(), mapped.tensors, tp, fused_tensors=mapped.fused_tensors)
    assert bound.untouched == (name,)
    assert name not in {parameter.name for parameter in bound.parameters}
    (batch,) = pack(samples(), 256)
    with torch.no_grad():
        before = bound.sequence_logprobs(batch).tokens.clone()
        mapped.tensors[name][1].copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))  # all tokens go to two of four experts
        after = bound.sequence_logprobs(batch).tokens
    assert not torch.equal(before, after)


def test_the_page_lists_every_family_and_case() -> None:
    """docs/models.md is generated from this suite; a family added without it shows here."""
    from tests.support.models_page import PAGE

    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in CASES] == list(CASES)
