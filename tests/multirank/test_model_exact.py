"""Loss, log-probabilities and every gradient equal the single-process Hugging Face model at TP = 1, 2 and 4."""

from __future__ import annotations

import functools
import traceback

import pytest

from apollo_tp.parallel import TPGroup
from tests.multirank.exactness import compare
from tests.ranks import run_ranks
from tests.unit.families import FAMILIES

ONE_BATCH, THREE_BATCHES = 256, 64  # tokens per micro-batch; the samples hold 145 tokens

CASES = {family: (family, {}, ONE_BATCH, False) for family in FAMILIES} | {
    "accumulation over 3 micro-batches": ("qwen3", {}, THREE_BATCHES, False),
    "accumulation and checkpointing, tied": ("qwen3-tied", {}, THREE_BATCHES, True),
    "checkpointing": ("llama-biases", {}, ONE_BATCH, True),
    "a rank without vocabulary rows": ("llama", {"vocab_size": 70}, ONE_BATCH, False),
    "one KV head": ("qwen3", {"num_key_value_heads": 1}, THREE_BATCHES, False),
    "padding token in the text": ("llama", {"pad_token_id": 7}, ONE_BATCH, False),
}


def _run_cases(tp: TPGroup) -> dict[str, dict[str, float] | str]:
    results: dict[str, dict[str, float] | str] = {}
    for case, arguments in CASES.items():
        try:
            results[case] = compare(tp, *arguments)
        except Exception:  # noqa: BLE001 - reported by the case's own test
            results[case] = traceback.format_exc()
            break  # the other ranks are in another collective now: no later case can be trusted
    return results


@functools.cache
def _results(size: int) -> list[dict[str, dict[str, float] | str]]:
    return run_ranks(_run_cases, size, deadline_seconds=240)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_single_process_model(case: str, size: int) -> None:
    """fp32; the sums over heads, columns and vocabulary run in another order, hence 1e-5 and not 0."""
    tolerance = FAMILIES[CASES[case][0]].tolerance
    for rank, results in enumerate(_results(size)):
        errors = results.get(case, "not run: an earlier case failed")
        assert not isinstance(errors, str), errors
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not wrong, f"rank {rank}: {wrong}"
