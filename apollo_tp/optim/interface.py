"""Plain records: what goes into an optimizer, what comes out of a step, and what passes between its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from apollo_tp.shards.boxes import Shard

if TYPE_CHECKING:
    from apollo_tp.optim.sharding import MatrixGroup


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

    ``write`` (int32) is 1 for each parameter to write, 0 for all in a skipped step. ``coefficients`` (fp32) multiplies
    channel scale and gradient (matrices), ``clip`` (fp32, 0-d) the gradient (AdamW). ``good`` (int32, 0-d) is 1 if all is
    finite, no step too long, and every collective happened. ``report`` (fp64, 3 + 2 x parameters): see ``read_report``.
    ``local_sums`` (fp32) are this rank's squared gradient norms and, last, a NaN if its loss is not finite.
    """

    learning_rate: float
    clip: Tensor
    write: Tensor
    coefficients: Tensor
    good: Tensor
    report: Tensor
    local_sums: Tensor
    _sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def send_report(self) -> None:
        """Start to copy ``report`` to the host. Before the write, so that nobody waits for that."""
        if self.report.device.type != "cuda":
            self._sent = self.report, None
            return
        host = torch.empty(self.report.shape, dtype=self.report.dtype, pin_memory=True)
        host.copy_(self.report, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent = host, event

    def read_report(self) -> list[float]:
        """3 + 2 x parameters numbers: whether every collective happened, finite, squared gradient norm, write flags,
        relative updates. Waits for them."""
        assert self._sent is not None  # Bundle.update sent it
        report, event = self._sent
        if event is not None:
            event.synchronize()
        return report.tolist()  # type: ignore[no-any-return]

    def written(self) -> list[bool]:
        """Which parameters of the bundle were written. Waits for the report."""
        return [bool(flag) for flag in self.read_report()[3 : 3 + len(self.write)]]


@dataclass(frozen=True)
class Sums:
    """From which a step is decided, the same on all ranks: fp32 on the device, each replicated element counted once.

    ``squares`` (parameters + 1,): squared gradient norms, last a NaN if a loss is not finite. ``norms`` (parameters, 2): see
    Bundle._update_norms. ``clip`` 0-d. ``local_squares``: this rank's part of ``squares``. ``alive`` (1,): the number of
    ranks on which no earlier part of the step forbids to write. ``checks``: canaries of all collectives that lead here,
    summed over ranks; ``Facts.checks`` is what they are if all of them happened on all ranks.
    """

    local_squares: Tensor
    squares: Tensor
    norms: Tensor
    clip: Tensor
    alive: Tensor
    checks: Tensor


@dataclass(frozen=True)
class Facts:
    """What a decision depends on beside the sums: (parameters,) on the device, fp64 unless noted.

    ``projected`` (int32): 2 for APOLLO's matrices, 1 for those that the limiter leaves alone, else 0. ``root_scales``:
    square roots of their scale. ``places`` (int64): where each parameter stands in ``limiter_norms`` and ``weight_norms``,
    which are those of the whole model; ``limiter_norms`` is moved by the decision. ``corrections``: Adam's bias correction
    of this step; ``steps`` (int32): updates before it. ``learning_rate`` 0-d. ``checks`` (fp32, as many as in ``Sums``):
    what the canaries must be; the first is the number of ranks.
    """

    projected: Tensor
    root_scales: Tensor
    places: Tensor
    limiter_norms: Tensor
    weight_norms: Tensor
    corrections: Tensor
    steps: Tensor
    learning_rate: Tensor
    checks: Tensor


@dataclass(frozen=True)
class Scales:
    """Channel scales of all matrices. ``local`` (rows of all groups,) are those of this rank's rows of moments. ``gathered``
    (ranks, rows of all exchanged groups + 1) holds other ranks' too and, last, the canary of each rank's part; None if no
    matrix is exchanged. APOLLO-Mini: all 1."""

    local: Tensor
    gathered: Tensor | None
    starts: dict[int, int]
    """Column of ``gathered`` where an exchanged parameter's rows begin."""

    def of(self, group: MatrixGroup, position: int) -> Tensor:
        """(local channels,) scales of one matrix, fp32."""
        matrix = group.matrices[position]
        if not group.exchanged:
            return self.local[group.first_row :][group.rows(position)]
        assert self.gathered is not None  # Bundle._gather_scales
        start = self.starts[matrix.index]
        return self.gathered[:, start : start + matrix.per_rank].reshape(-1)[: matrix.num_channels]
