"""What goes into an optimizer and what comes out of a step: plain records that the trainer shares with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from apollo_tp.layout import Shard


@dataclass(frozen=True)
class OptimParameter:
    """One checkpoint tensor as this rank trains it.

    ``tensor`` is the LOCAL served view (bf16 or fp32). Its ``.grad`` must hold the complete local gradient when ``step``
    is called: already summed over ranks where the parameter is replicated inside a parallel region, and over KV replicas.
    ``role`` is "embedding" for the embedding and the head, "matrix" for linear layers, "other" for the rest.
    """

    shard: Shard
    tensor: torch.nn.Parameter
    role: Literal["matrix", "embedding", "other"]

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def grad(self) -> torch.Tensor | None:
        """The local gradient. Anything with these five attributes can be trained; a slice of a stacked leaf too."""
        return self.tensor.grad


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank.

    ``skipped`` says why nothing at all was written ("" if something may have been). ``grad_norm`` is the global norm
    before clipping, each replicated element counted once. ``num_updated`` counts the parameters that were written: one
    whose gradient is exactly zero is left alone. ``largest_update`` is the largest ‖ΔW‖ / ‖W‖ over the matrices (without
    weight decay). ``skipped_in_a_row`` counts this and the skipped steps directly before it.
    """

    skipped: str
    grad_norm: float
    learning_rate: float
    num_updated: int
    largest_update: float
    skipped_in_a_row: int
