"""The cases of the suite of families, compared with the single-process Hugging Face model (apollo_tp.inspect.exactness)."""

from __future__ import annotations

import traceback
from pathlib import Path

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import compare
from tests.support.families import CASES, Case

UNTRAINED = ("e_score_correction_bias", "expert_bias")
"""Tensors that the model computes with and nobody trains."""
Results = list[dict[str, dict[str, float] | str]]
"""Per rank and case: errors by tensor, or a traceback."""


def check_case(tp: TPGroup, case: Case, checkpoint: Path) -> dict[str, float]:
    """Relative errors by name ("loss", "logprobs" and every checkpoint tensor) on this rank."""
    found = compare(tp, checkpoint, max_tokens=case.max_tokens, gradient_checkpointing=case.gradient_checkpointing)
    served = found.mapped.tensors
    for parameter in found.bound.parameters:
        address = served[parameter.name][1].data_ptr()
        assert parameter.tensor.data_ptr() == address, f"{parameter.name} was copied"
    untouched = found.bound.untouched
    assert set(found.errors) - {"loss", "logprobs"} == set(found.gradients), "a gradient is missing"
    assert all(any(kind in name for kind in ("vision", "visual", "projector", *UNTRAINED)) for name in untouched)
    assert set(untouched) | set(found.gradients) == set(served)
    return found.errors


def run_cases(tp: TPGroup, folder: Path) -> dict[str, dict[str, float] | str]:
    """Errors by tensor per case on this rank, or the traceback where a case failed."""
    results: dict[str, dict[str, float] | str] = {}
    for name, case in CASES.items():
        try:
            results[name] = check_case(tp, case, folder / case.checkpoint)
        except Exception:  # noqa: BLE001 - reported by the case's own test
            results[name] = traceback.format_exc()
            break  # the other ranks are in another collective now: no later case can be trusted
    return results
