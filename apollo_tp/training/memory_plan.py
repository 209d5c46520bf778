"""Will the largest micro-batch fit? From the memory that short micro-batches took to what the longest one will take.

Arithmetic alone, no torch: ``rehearsal`` measures. Within one stretch of a step (the forward pass, or the backward pass
from one gradient to the next) memory is a straight line in the number of tokens, since attention keeps no scores and the
loss works in chunks; the step needs the highest of these lines. Which stretch that is may change with the length, so that
one line for the whole step would not do: with recomputation the head's gradient is the peak of a short micro-batch, a layer
that of a long one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.05
"""Share of the need that is asked for on top: fragmentation of the allocator, and what a line does not see."""
STRAIGHT = 0.03
"""The two shorter lengths must predict the longest one up to this share of it, or a longer one is measured."""
SHORTEST, LONGER = 256, 4096
"""Tokens of the shortest of three lengths, and how much longer it may be where the loss needs that for a whole chunk."""


@dataclass(frozen=True)
class Rehearsed:
    """One micro-batch that was run: ``peaks`` are the bytes allocated at most in each stretch of it, in order."""

    tokens: int
    peaks: tuple[int, ...]


def first_lengths(max_tokens: int, chunk_tokens: int) -> list[int]:
    """Tokens of the micro-batches to measure, ascending: up to three, each about twice the one before.

    None is above ``max_tokens``. The logits' part grows until the loss fills a chunk and stays from there on: hence all are
    at least ``chunk_tokens`` long where LONGER and the maximum leave room for that (elsewhere the plan is too high).
    """
    longest = min(max_tokens, 4 * min(max(SHORTEST, chunk_tokens), LONGER))
    return sorted({max(2, longest // 4), max(2, longest // 2), longest})


def predict(rehearsed: Sequence[Rehearsed], tokens: int) -> int:
    """Peak bytes at ``tokens``: the highest of the lines through the two longest micro-batches of ``rehearsed``."""
    if len(rehearsed) == 1:
        return max(rehearsed[0].peaks)
    short, long = rehearsed[-2:]
    share = (tokens - long.tokens) / (long.tokens - short.tokens)
    return max(round(b + (b - a) * share) for a, b in zip(short.peaks, long.peaks, strict=True))


def is_straight(rehearsed: Sequence[Rehearsed], base: int) -> bool:
    """Whether the micro-batches before the last predict it, to STRAIGHT of what it took beyond ``base`` bytes."""
    if len(rehearsed) < 3:
        return False
    measured = max(rehearsed[-1].peaks)
    return abs(predict(rehearsed[:-1], rehearsed[-1].tokens) - measured) <= STRAIGHT * (measured - base)


def longest_that_fits(rehearsed: Sequence[Rehearsed], max_tokens: int, limit: int) -> int:
    """The largest number of tokens, up to ``max_tokens``, whose predicted peak is at most ``limit`` bytes; 0 if none."""
    return bisect.bisect_right(range(1, max_tokens + 1), limit, key=lambda tokens: predict(rehearsed, tokens))


@dataclass(frozen=True)
class MemoryPlan:
    """What the longest micro-batch needs on one rank beyond all that is allocated already, in bytes.

    ``gradients`` are those that live until the optimizer's step; ``activations`` are the most that forward and backward
    pass need beside them, ``optimizer`` the most that the optimizer's step needs beside them. ``available`` is what the
    device and this process's allocator have free. ``largest`` is the number of tokens that would fit.
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
        """With MARGIN. Activations are gone when the optimizer's step begins."""
        return round((self.gradients + max(self.activations, self.optimizer)) * (1 + MARGIN))

    @property
    def missing(self) -> int:
        """Bytes that are not there; negative if all are."""
        return self.needed - self.available

    def fits_replays(self, *, beside: bool) -> bool:
        """Whether recorded passes, which keep their memory, fit beside the optimizer's temporaries; with ``beside``, also
        beside passes that are not recorded."""
        passes = self.gradients + self.activations
        return round((passes * (2 if beside else 1) + self.optimizer) * (1 + MARGIN)) <= self.available

    def describe(self) -> str:
        """One line for status pages and logs."""
        return (
            f"{_gb(self.needed)} planned for a micro-batch of {self.tokens} tokens on rank {self.rank} ({self._parts()}), "
            f"{_gb(self.available)} free"
        )

    def refusal(self, *, recomputes: bool, fused: bool) -> str:
        """What is wrong and what to do; the two options that would help are named unless they are on."""
        least = "" if self.activations else "at least "  # refused before anything was rehearsed
        lower = f"lower train.max_micro_batch_tokens to {self.largest}, which would fit" if self.largest >= 2 else ""
        return (
            f"rank {self.rank}: got {_gb(self.available)} free on its GPU, expected {least}{_gb(self.needed)} for a "
            f"micro-batch of train.max_micro_batch_tokens={self.tokens} ({self._parts()}); "
            f"{_cures(lower, recomputes=recomputes, fused=fused)}"
        )

    def _parts(self) -> str:
        return (
            f"{_gb(self.gradients)} of weights' gradients, then {_gb(self.activations)} of activations or "
            f"{_gb(self.optimizer)} of the optimizer's temporaries, and {MARGIN:.0%}"
        )


def ran_out(
    rank: int, tokens: int, max_tokens: int, available: int, largest: int, *, recomputes: bool, fused: bool
) -> str:
    """The refusal where a trial of ``tokens`` ran out of memory. ``largest`` is what shorter ones say would fit, or 0."""
    lower = f"lower it to {largest}, which would fit" if largest >= 2 else f"lower it below {tokens}"
    return (
        f"rank {rank}: got an out-of-memory error from a trial micro-batch of {tokens} tokens ({_gb(available)} free on its "
        f"GPU), expected room for train.max_micro_batch_tokens={max_tokens}; "
        f"{_cures(lower, recomputes=recomputes, fused=fused)}"
    )


def _cures(lower: str, *, recomputes: bool, fused: bool) -> str:
    """``lower`` (nothing if "") and the other things that help, but for what is done already."""
    cures = [
        lower,
        "" if recomputes else "set train.gradient_checkpointing=true",
        "" if fused else "set train.gradients=fused optim.max_grad_norm=null",
        "start vLLM with a smaller --gpu-memory-utilization or --kv-cache-memory-bytes",
    ]
    return ", ".join(filter(None, cures)) + ", or end what else uses the GPU"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
