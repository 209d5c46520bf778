"""Plain records: what goes into an optimizer, what comes out of a step, and what passes between its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from apollo_tp.layout import Shard

if TYPE_CHECKING:
    from apollo_tp.optim.matrices import MatrixGroup


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
        """The local gradient. Anything with these six attributes can be trained; a slice of a stacked leaf too."""
        return self.tensor.grad

    @property
    def complete_leaf(self) -> torch.nn.Parameter | None:
        """The leaf of autograd whose gradient, once accumulated, is ``grad`` and complete; None if there is none."""
        return self.tensor


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank.

    ``skipped`` says why the step was stopped, and what was written before that: nothing, but for the first matrices of a
    fused step; "" if it went through. ``grad_norm`` is the global norm before clipping, each replicated element counted
    once. ``num_updated`` counts the parameters that were written: one whose gradient is exactly zero is left alone.
    ``largest_update`` is the largest ‖ΔW‖ / ‖W‖ over the matrices (without weight decay). ``skipped_in_a_row`` counts this
    and the skipped steps directly before it.
    """

    skipped: str
    grad_norm: float
    learning_rate: float
    num_updated: int
    largest_update: float
    skipped_in_a_row: int


@dataclass
class Decision:
    """What all ranks know before anything is written, as device tensors; (parameters of the bundle,) unless noted.

    ``write`` says which parameters to write (all False in a skipped step), ``coefficients`` multiplies channel scale and
    gradient (matrices), ``clip`` (0-d) the gradient (AdamW). ``good`` (0-d): finite, and no step too long. ``local_sums``
    are this rank's squared gradient norms and, last, a NaN if its loss is not finite.
    """

    learning_rate: float
    clip: Tensor
    write: Tensor
    coefficients: Tensor
    limiter_norms: Tensor
    old_limiter_norms: Tensor
    relative_updates: Tensor
    grad_norm: Tensor
    finite: Tensor
    good: Tensor
    local_sums: Tensor
    _sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def under(self, alive: Tensor) -> Decision:
        """This decision with nothing written where ``alive`` (0-d bool) is False."""
        write = self.write & alive
        return replace(self, write=write, limiter_norms=torch.where(alive, self.limiter_norms, self.old_limiter_norms))

    def send_report(self) -> None:
        """Start to copy to the host what ``read_report`` returns. Before the write, so that nobody waits for that."""
        flat = [self.finite[None], self.grad_norm.square()[None], self.write, self.relative_updates]
        report = torch.cat([part.double() for part in flat])
        if report.device.type != "cuda":
            self._sent = report, None
            return
        host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        host.copy_(report, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent = host, event

    def read_report(self) -> list[float]:
        """2 + 2 x parameters numbers: finite, squared gradient norm, write flags, relative updates. Waits for them."""
        assert self._sent is not None  # Bundle.update sent it
        report, event = self._sent
        if event is not None:
            event.synchronize()
        return report.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Scales:
    """Channel scales of all matrices. ``gathered`` (ranks, rows of all exchanged groups) holds those of other ranks too;
    None if no matrix is exchanged or the scales are one number per matrix (APOLLO-Mini)."""

    gathered: Tensor | None
    starts: dict[int, int]
    """Column of ``gathered`` where an exchanged parameter's rows begin."""

    def of(self, group: MatrixGroup, position: int) -> Tensor:
        """(local channels,) scales of one matrix, fp32."""
        matrix = group.matrices[position]
        if not group.exchanged:
            return group.scales[group.rows(position)]
        if self.gathered is None:
            return torch.ones(matrix.num_channels, device=group.device)
        start = self.starts[matrix.index]
        return self.gathered[:, start : start + matrix.per_rank].reshape(-1)[: matrix.num_channels]
