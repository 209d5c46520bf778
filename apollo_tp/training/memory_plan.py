"""Will the largest micro-batch fit? From the memory that short micro-batches took to what the longest one will take.

Only arithmetic, no torch: ``memory_profiling`` measures. Within one segment of a step (the forward pass, or the
backward pass from one gradient to the next) memory is linear in the number of tokens, since attention keeps no scores
and the loss works in chunks; the step needs the highest of these lines. Which segment that is may change with the
length, so that one line for the whole step would not do: with recomputation the head's gradient is the peak of a short
micro-batch, a layer that of a long one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.05
"""Share of the need that is asked for on top: fragmentation of the allocator, and needs that are not linear."""
LINEARITY_TOLERANCE = 0.03
"""The two shorter lengths must predict the longest one up to this share of it, or a longer one is measured."""
MIN_TOKENS, MAX_FIRST_TOKENS = 256, 4096
"""Tokens of the shortest of three lengths; more where the loss needs that for a whole chunk, up to the second number."""


@dataclass(frozen=True)
class ProfiledRun:
    """One micro-batch that was run: ``peaks`` are the bytes allocated at most in each segment of it, in order."""

    tokens: int
    peaks: tuple[int, ...]


def first_lengths(max_tokens: int, chunk_tokens: int, max_first_tokens: int = MAX_FIRST_TOKENS) -> list[int]:
    """Tokens of the micro-batches to measure, ascending: up to three, each about twice the one before.

    None is above ``max_tokens``. The logits' part grows until the loss fills a chunk and stays from there on: so all
    have at least ``chunk_tokens`` where ``max_first_tokens`` and the maximum allow that (elsewhere the plan is too
    high).
    """
    longest = min(max_tokens, 4 * min(max(MIN_TOKENS, chunk_tokens), max_first_tokens))
    return sorted({max(2, longest // 4), max(2, longest // 2), longest})


def predict(runs: Sequence[ProfiledRun], tokens: int) -> int:
    """Peak bytes at ``tokens``: the highest of the segments' lines through the two longest of ``runs``, which ascend."""
    if len(runs) == 1:
        return max(runs[0].peaks)
    short, long = runs[-2:]
    share = (tokens - long.tokens) / (long.tokens - short.tokens)
    return max(round(b + (b - a) * share) for a, b in zip(short.peaks, long.peaks, strict=True))


def is_linear(runs: Sequence[ProfiledRun], base: int) -> bool:
    """True if all but the last of ``runs`` predict it, to LINEARITY_TOLERANCE of what it took beyond ``base`` bytes."""
    if len(runs) < 3:
        return False
    measured = max(runs[-1].peaks)
    return abs(predict(runs[:-1], runs[-1].tokens) - measured) <= LINEARITY_TOLERANCE * (measured - base)


def longest_that_fits(runs: Sequence[ProfiledRun], max_tokens: int, limit: int) -> int:
    """The largest number of tokens, up to ``max_tokens``, whose predicted peak is at most ``limit`` bytes; 0 if none."""
    return bisect.bisect_right(range(1, max_tokens + 1), limit, key=lambda tokens: predict(runs, tokens))


@dataclass(frozen=True)
class MemoryPlan:
    """What the longest micro-batch needs on one rank beyond all that is allocated already, in bytes.

    ``gradients`` are those that live until the optimizer's step; ``activations`` are the most that forward and backward
    pass need in addition, ``optimizer`` the most that the optimizer's step does. ``available`` is what the device and
    this process's allocator have free. ``largest`` is the number of tokens that would fit.
    """

    rank: int
    tokens: int
    gradients: int
    activations: int
    optimizer: int
    available: int
    largest: int

    @property
    def needed(self) -> int:
        """Bytes needed, MARGIN included. Activations are freed before the optimizer's step begins."""
        return round((self.gradients + max(self.activations, self.optimizer)) * (1 + MARGIN))

    @property
    def missing(self) -> int:
        """Bytes needed beyond those available; negative if there are more than enough."""
        return self.needed - self.available

    def needed_with_graphs(self, *, keep: bool) -> int:
        """Bytes needed by captured passes, which keep their memory, together with the optimizer's temporaries; with
        ``keep``, also together with passes that are not captured. MARGIN included."""
        passes = self.gradients + self.activations
        return round((passes * (2 if keep else 1) + self.optimizer) * (1 + MARGIN))

    def describe(self, with_graphs: int = 0) -> str:
        """One line for status pages and logs; ``with_graphs``: bytes needed if steps are recorded, else 0."""
        return (
            f"{_gb(self.needed)} planned for a micro-batch of {self.tokens} tokens on rank {self.rank} ({self._parts()}), "
            f"{_gb(self.available)} free; steps of one structure are "
            f"{f'recorded, which takes {_gb(with_graphs)}' if with_graphs else 'not recorded'}"
        )

    def refusal(self, *, recomputes: bool, in_backward: bool) -> str:
        """What is wrong and what to do; recomputation and updates in the backward pass are named unless they are on."""
        least = "" if self.activations else "at least "  # refused before anything was profiled
        lower = f"lower train.max_micro_batch_tokens to {self.largest}, which would fit" if self.largest >= 2 else ""
        return (
            f"rank {self.rank}: got {_gb(self.available)} free on its GPU, expected {least}{_gb(self.needed)} for a "
            f"micro-batch of train.max_micro_batch_tokens={self.tokens} ({self._parts()}); "
            f"{_cures(lower, recomputes=recomputes, in_backward=in_backward)}"
        )

    def _parts(self) -> str:
        return (
            f"{_gb(self.gradients)} of weights' gradients, then {_gb(self.activations)} of activations or "
            f"{_gb(self.optimizer)} of the optimizer's temporaries, and {MARGIN:.0%}"
        )


def out_of_memory(
    rank: int, tokens: int, max_tokens: int, available: int, largest: int, *, recomputes: bool, in_backward: bool
) -> str:
    """The refusal where a trial of ``tokens`` ran out of memory. ``largest`` is what shorter ones say would fit, or 0."""
    lower = f"lower it to {largest}, which would fit" if largest >= 2 else f"lower it below {tokens}"
    return (
        f"rank {rank}: got an out-of-memory error from a trial micro-batch of {tokens} tokens ({_gb(available)} free on its "
        f"GPU), expected room for train.max_micro_batch_tokens={max_tokens}; "
        f"{_cures(lower, recomputes=recomputes, in_backward=in_backward)}"
    )


def _cures(lower: str, *, recomputes: bool, in_backward: bool) -> str:
    """``lower`` (nothing if "") and the other things that help, except for those that are on already."""
    cures = [
        lower,
        "" if recomputes else "set train.gradient_checkpointing=true",
        "" if in_backward else "set train.gradients=in_backward optim.max_grad_norm=null",
        "start vLLM with a smaller --gpu-memory-utilization or --kv-cache-memory-bytes",
    ]
    return ", ".join(filter(None, cures)) + ", or end what else uses the GPU"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
