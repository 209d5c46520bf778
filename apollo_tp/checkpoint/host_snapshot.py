"""The served weights and the optimizer's state as they were, in host memory: what a guard goes back to without a disk.

It is lost with its process. ``fallback`` is the checkpoint that is restored in its place then, also where the process ends
while the snapshot is put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from apollo_tp.checkpoint.card import Trained
from apollo_tp.checkpoint.transfers import HostMemory, Transfers, needed, row_slices
from apollo_tp.optim import Optimizer


class HostSnapshots:
    """At most one snapshot at a time, which all ranks of a trainer take and put back together. ``weights`` are the views of
    served memory of this rank."""

    def __init__(self, weights: Iterable[Tensor], optimizer: Optimizer) -> None:
        from apollo_tp.checkpoint import optimizer_state  # takes a second to import

        state = optimizer_state.local_tensors(optimizer)
        self._tensors: Sequence[Tensor] = [each.detach() for each in (*weights, *state)]
        self._optimizer, self._memory = optimizer, HostMemory()
        self._copies: list[Tensor] = []
        self.name, self.fallback, self.trained = "", Path(), Trained()

    @property
    def num_bytes(self) -> int:
        """What this rank's part of a snapshot takes."""
        return needed(self._tensors)

    @property
    def more_bytes(self) -> int:
        """What the next one takes beside the memory that was kept."""
        return max(0, self.num_bytes - self._memory.num_bytes)

    def take(self, name: str, fallback: Path, trained: Trained) -> None:
        """Copy this rank's part. Local."""
        self.name = ""
        with Transfers(self._optimizer.device) as transfers:
            self._copies = self._memory.copies(self._tensors, transfers)
        counters = self._optimizer.update_group.counters
        self._counters = list(counters.steps), counters.limiter_norms.clone()
        self._counts = self._optimizer.step_count, self._optimizer.rounding_stream
        self.name, self.fallback, self.trained = name, fallback, trained

    def put_back(self) -> None:
        """Write this rank's part into the served memory and the optimizer. Local; what raises here leaves it in part."""
        parts = (
            (tensor[rows], copy[rows])
            for tensor, copy in zip(self._tensors, self._copies, strict=True)
            for rows in row_slices(tensor)
        )
        with Transfers(self._optimizer.device) as transfers:
            for _ in transfers.run(lambda part: part[0].copy_(transfers.to_device(part[1])), parts):
                pass
        optimizer = self._optimizer
        optimizer.update_group.counters.steps = list(self._counters[0])
        optimizer.update_group.counters.limiter_norms.copy_(self._counters[1])
        optimizer.step_count, stream = self._counts
        optimizer.use_rounding_stream(stream)
