"""What the trainer's calls return, the same on every rank, besides the figures of a step."""

from __future__ import annotations

from dataclasses import dataclass

from apollo_tp.wire.commands import StepFigures


@dataclass(frozen=True)
class PassFigures:
    """What one ``forward_backward`` added, the same on every rank: loss in nats, tokens, tokens with a weight; the number of
    calls since the last step, seconds, and further figures by name."""

    loss: float
    num_tokens: int
    num_loss_tokens: int
    num_passes: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class ScoreResult:
    """Per sample, in the order given, the same on every rank: weighted log-probability in nats, sum of weights, and the
    number of tokens with a weight that are the arg max of the model's prediction. ``token_logprobs`` has the
    log-probability of each token of each sample, 0 where its weight is 0."""

    logprobs: list[float]
    weights: list[float]
    num_correct: list[float]
    token_logprobs: list[list[float]]


def nothing_learned(why: str, weight_version: int, seconds: float) -> StepFigures:
    """The figures of a step that all ranks gave up before its first gradient."""
    counts = dict.fromkeys(("num_tokens", "num_loss_tokens", "num_micro_batches", "num_updated"), 0)
    numbers = dict.fromkeys(
        ("loss", "token_accuracy", "padding_share", "grad_norm", "learning_rate", "largest_update", "paused_seconds",
         "forward_seconds", "backward_seconds", "optimizer_seconds"), 0.0,
    )  # fmt: skip
    return StepFigures(
        **counts,
        **numbers,
        gradients="stored",
        skipped=why,
        weight_version=weight_version,
        step_seconds=seconds,
        peak_memory_bytes=[],
        metrics={},
    )
