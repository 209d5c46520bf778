"""Every family over the layout of real vLLM's loader: loss, log-probabilities and every gradient equal the single-process
Hugging Face model at TP = 1, 2 and 4."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.support.exactness import Results, run_cases
from tests.support.families import CASES, SIZES
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


def test_the_page_lists_every_family_and_case() -> None:
    """docs/models.md is generated from this suite; a family added without it shows here."""
    from tests.support.models_page import PAGE

    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in CASES] == list(CASES)
