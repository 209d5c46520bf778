"""A step's figures as a trainer would report them, for tests of their readers."""

from __future__ import annotations

from typing import Any

import msgspec

from apollo_tp.wire.commands import StepFigures


def step_figures(**changes: Any) -> StepFigures:
    """Figures of an ordinary step, with ``changes``."""
    figures = StepFigures(
        loss=2.5, token_accuracy=0.5, num_tokens=4, num_loss_tokens=2, padding_share=0.25, num_micro_batches=1,
        gradients="stored", grad_norm=1.0, learning_rate=1e-5, largest_update=1e-3, num_updated=7, skipped="",
        weight_version=1, step_seconds=0.4, forward_seconds=0.1, backward_seconds=0.2, optimizer_seconds=0.05,
        paused_seconds=0.0, peak_memory_bytes=[1000, 2000], metrics={},
    )  # fmt: skip
    return msgspec.structs.replace(figures, **changes)


def without_times(figures: StepFigures) -> StepFigures:
    """The figures that are equal in two runs of the same step."""
    return msgspec.structs.replace(
        figures, step_seconds=0.0, forward_seconds=0.0, backward_seconds=0.0, optimizer_seconds=0.0, paused_seconds=0.0
    )
