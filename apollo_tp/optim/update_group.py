"""Parameters that are decided together: from local gradients to a decision that all ranks share, and then the write.

One bundle holds all parameters of a model and their state. For updates inside the backward pass, every matrix whose
gradient is freed at once is a part of it: a bundle of its own that shares the state, so that each step may take the one or
the other way. Order, within a bundle:
    1. project every matrix (one read of its gradient), which also gives the squared norm of each channel;
    2. add what crosses ranks: one reduce-scatter per bucket of matrices cut along their contracted dimension, one all-gather
       of their channel scales, and last all scalars in one all-reduce (clipping needs the global norm first: one more, of
       one float per parameter);
    3. decide from the added scalars alone, so that every rank decides the same;
    4. only then move moments and write weights.
Each collective of step 2 carries a canary, and the last one adds up what every rank found in those before it: no rank writes
if one of them did not happen somewhere. Between decision and write nothing more crosses ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apollo_tp.config import EmbeddingMode, OptimConfig, OptimizerKind
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim.adamw import AdamWState
from apollo_tp.optim.interface import Decision, Facts, OptimParameter, Scales, Sums
from apollo_tp.optim.sharding import Matrix, make_groups, moment_rank, refresh_projections
from apollo_tp.optim.torch_backend import TorchBackend
from apollo_tp.optim.weight import Weight, to_device

if TYPE_CHECKING:
    from apollo_tp.optim.triton_backend import TritonBackend

BUCKET_BYTES = 64 * 2**20
"""Upper bound of one reduce-scatter's buffer; a single larger matrix gets a bucket of its own."""


class Counters:
    """Per parameter of a whole bundle: updates so far, and fp64 norms (parameters,) of the limiter and of the weights."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.steps = [0] * count
        self.limiter_norms = torch.zeros(count, dtype=torch.float64, device=device)
        self.weight_norms = torch.full((count,), math.inf, dtype=torch.float64, device=device)


class Bundle:
    """State of some parameters on this rank, complete from construction on (same keys on every rank).

    Vectors have one entry per parameter of the bundle, in the order of ``weights``. With ``whole``, ``weights`` are some of
    that bundle's, and all state is its: ``counters``, and views of its moments.
    """

    def __init__(
        self, weights: Sequence[Weight], config: OptimConfig, tp: TPGroup, whole: Bundle | None = None
    ) -> None:
        self.weights, self.config, self.tp = [w.at(i) for i, w in enumerate(weights)], config, tp
        self.device, count = weights[0].data.device, len(weights)
        self.places = [w.index for w in weights] if whole else list(range(count))
        self.counters = whole.counters if whole else Counters(self.device, count)
        self.place_index = torch.tensor(self.places, device=self.device)
        self.matrices = [Matrix(w, config, tp) for w in self.weights if projects(w.parameter, config)]
        roots = {m.index: m.root_scale for m in self.matrices}
        others = [w for w in self.weights if w.index not in roots]
        if whole:
            states = {a.index: a for a in whole.adamw}
            self.adamw = [AdamWState(w, states[self.places[w.index]]) for w in others]
            chosen = {self.places[m.index]: m for m in self.matrices}
            self.groups = [part for group in whole.groups for part in group.parts(chosen)]
        else:
            self.adamw = [AdamWState(w) for w in others]
            self.groups = make_groups(self.matrices, moment_rank(config), tp, BUCKET_BYTES)
        self.backend = _make_backend(self)
        self._place_rows()
        self.scales = self.no_scales = torch.empty(0, device=self.device)
        self.ones = self.vector([1.0]).float()
        self.checks = self.vector(self._expected_checks()).float()
        limited = {m.index for m in self.matrices if m.weight.parameter.role == "matrix"}
        self.is_projected = self.vector([float((i in roots) + (i in limited)) for i in range(count)]).int()
        self.root_scales = self.vector([roots.get(i, 1.0) for i in range(count)])
        self.adamw_index = torch.tensor([a.index for a in self.adamw], dtype=torch.int64, device=self.device)
        self.adamw_counts = self.vector([float(a.weight.represents) for a in self.adamw]).float()
        self.adamw_in_part = [a for a in self.adamw if a.weight.counted is not None]  # few: in plain torch everywhere

    def _expected_checks(self) -> list[float]:
        """What the canaries of a step are once they are summed over ranks, in the order of ``_decide``."""
        size, num_exchanges = self.tp.size, sum(group.exchanged for group in self.groups)
        expected = [size, size] + [size * size] * (num_exchanges + (self.config.max_grad_norm is not None))
        return [float(n) for n in (*expected, *([size] * size if self._gathers else []))]

    @property
    def _gathers(self) -> bool:
        """Whether ranks need channel scales of each other: APOLLO-Mini's are all 1."""
        return self.config.kind is OptimizerKind.apollo and any(group.exchanged for group in self.groups)

    def _place_rows(self) -> None:
        """Where the rows of moments of each group lie among those of all, and what their sums by matrix need."""
        first_rows = list(itertools.accumulate((g.num_rows for g in self.groups), initial=0))
        for group, first_row in zip(self.groups, first_rows[:-1], strict=True):
            group.first_row = first_row
        if self.groups:
            self.matrix_index = torch.cat([g.index for g in self.groups])
            self.row_counts = torch.cat([g.counts for g in self.groups])
            self.row_lengths = torch.cat([g.segments for g in self.groups])
        self.local_rows = sum(g.num_rows for g in self.groups if not g.exchanged)  # groups without exchange come first
        exchanged = [m for g in self.groups if g.exchanged for m in g.matrices]
        starts = itertools.accumulate((m.per_rank for m in exchanged), initial=0)
        self.gather_starts = {m.index: start for m, start in zip(exchanged, starts, strict=False)}

    @property
    def steps(self) -> list[int]:
        """Updates of each parameter; a step with zero gradient is none."""
        return [self.counters.steps[place] for place in self.places]

    def vector(self, values: Sequence[float]) -> Tensor:
        """(len(values),) fp64 on the device, without waiting for it."""
        return to_device(values, torch.float64, self.device)

    def update(
        self,
        lr: float,
        loss: Tensor | None = None,
        alive: Tensor | None = None,
        received: Tensor | None = None,
    ) -> Decision:
        """Decide and, if so decided, write. Nothing is written on any rank unless ``alive`` and ``received`` (fp32, (1,))
        are 1 on all: an earlier part of the step does not forbid it, and what this rank got from others before has
        arrived.

        The counters of the bundle follow in ``accept``, once the decision has been read. Collectives: see the module.
        """
        gradients = [weight.gradient() for weight in self.weights]
        flags = [self.ones if flag is None else flag for flag in (alive, received)]
        decision, scales = self._decide(gradients, lr, loss, *flags)
        decision.send_report()
        self.backend.write(gradients, decision, scales)
        for group in self.groups:
            group.release()
        self.scales = self.no_scales
        return decision

    def accept(self, written: Sequence[bool]) -> None:
        """Count the updates that a decision made."""
        for place, moved in zip(self.places, written, strict=True):
            self.counters.steps[place] += moved

    def part(self, weights: Sequence[Weight]) -> Bundle:
        """A bundle of some of the ``weights`` of this one, over the same state: either may update them."""
        return Bundle(weights, self.config, self.tp, whole=self)

    def local_square_norms(self) -> Tensor:
        """(parameters,) squared norms of this rank's part of each matrix, replicas once; 0 for one dimension."""
        zero = torch.zeros((), device=self.device)
        return torch.stack([w.square_norm(w.data) if w.is_matrix else zero for w in self.weights])

    def _decide(
        self, gradients: list[Tensor], lr: float, loss: Tensor | None, alive: Tensor, received: Tensor
    ) -> tuple[Decision, Scales]:
        """Steps 1 to 3. Touches neither moments nor weights."""
        config = self.config
        steps = self.steps
        refresh_projections(self.matrices, [steps[m.index] // config.refresh_every for m in self.matrices], config)
        counted = self._counted_once(gradients)
        self.backend.prepare(counted)
        self.backend.project(counted)  # first: the device is busy while the host prepares the rest
        if counted is not gradients:
            self.backend.prepare(gradients)
        facts = self._facts(lr, steps)
        self.backend.begin(lr, steps, facts.steps)
        squares = local_squares = self._local_square_sums(gradients, loss)
        for group in self.groups:
            group.exchange()
        checks = [self.ones, received, *(group.canary for group in self.groups if group.exchanged)]
        clip = self.ones[0]
        if config.max_grad_norm is not None:
            squares, counted = self.tp.all_reduce_(torch.cat([squares, self.ones])).tensor_split([-1])
            checks.append(counted)
            clip = (config.max_grad_norm / (squares[:-1].sum().sqrt() + 1e-6)).clamp(max=1.0)
        norms = self._update_norms(gradients, clip)
        scales = self._gather_scales()
        if self._gathers:
            assert scales.gathered is not None
            checks.append(scales.gathered[:, -1])
        parts = [norms.flatten(), alive, torch.cat(checks)]
        if config.max_grad_norm is None:
            parts.append(squares)
        packed = self.tp.all_reduce_(torch.cat(parts)).split([part.numel() for part in parts])
        if config.max_grad_norm is None:
            squares = packed[3]
        sums = Sums(local_squares, squares, packed[0].view_as(norms), clip, alive=packed[1], checks=packed[2])
        return self.backend.decide(lr, sums, facts), scales

    def _facts(self, lr: float, steps: Sequence[int]) -> Facts:
        """What the decision needs beside the sums; two small copies to the device."""
        numbers = self.vector([lr, *(_bias_correction(n + 1, *self.config.betas) for n in steps)])
        return Facts(
            projected=self.is_projected,
            root_scales=self.root_scales,
            places=self.place_index,
            limiter_norms=self.counters.limiter_norms,
            weight_norms=self.counters.weight_norms,
            corrections=numbers[1:],
            steps=to_device(steps, torch.int32, self.device),
            learning_rate=numbers[0],
            checks=self.checks,
        )

    def _counted_once(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients to project: without what another rank puts into the sum, where partial projections are summed. The
        same list if there are none such."""
        masks = {m.index: m.weight.counted for m in self.matrices if m.exchanged and m.weight.counted is not None}
        if not masks:
            return gradients
        return [g * masks[i].to(g.dtype) if i in masks else g for i, g in enumerate(gradients)]

    def _sum_rows(self, values: Tensor) -> Tensor:
        """(rows of all groups,) summed by matrix, (matrices of all groups,), each replicated channel on one rank only."""
        return torch.segment_reduce(values * self.row_counts, "sum", lengths=self.row_lengths, unsafe=True)

    def _gather_scales(self) -> Scales:
        """The channel scales of all matrices; one all-gather for those of exchanged ones, each rank's with a canary of 1."""
        exchanged = self.scales[self.local_rows :]
        if not exchanged.numel():
            return Scales(self.scales, None, {})
        if not self._gathers:
            return Scales(self.scales, exchanged.new_ones(self.tp.size, exchanged.numel() + 1), self.gather_starts)
        gathered = self.tp.all_gather(torch.cat([exchanged, self.ones])).view(self.tp.size, -1)
        return Scales(self.scales, gathered, self.gather_starts)

    def _local_square_sums(self, gradients: list[Tensor], loss: Tensor | None) -> Tensor:
        """(parameters + 1,) fp32: squared gradient norms of this rank's part, replicas once; last, not-finite losses."""
        sums = torch.zeros(len(self.weights) + 1, device=self.device)
        if self.groups:
            energies = [g.all_energy.sum(0) if g.exchanged else g.all_energy[0] for g in self.groups]
            sums[self.matrix_index] = self._sum_rows(torch.cat(energies))
        if self.adamw:
            sums[self.adamw_index] = self.backend.adamw_square_sums(gradients) * self.adamw_counts
            for state in self.adamw_in_part:
                sums[state.index] = state.weight.square_norm(gradients[state.index])
        if loss is not None:
            sums[-1] = torch.where(torch.isfinite(loss.detach()), 0.0, torch.nan).to(self.device)
        return sums

    def _update_norms(self, gradients: list[Tensor], clip: Tensor) -> Tensor:
        """(parameters, 2) fp32, this rank's part: what the limiter and the limit on the size of a step need.

        Channel scaling: squared norm of the scaled, clipped gradient; also sets ``scales`` (all rows,). APOLLO-Mini: the
        squared norms of adapted and projected gradient. AdamW: squared norm of the update at learning rate 1.
        """
        norms = torch.zeros(len(self.weights), 2, device=self.device)
        if self.groups and self.config.kind is OptimizerKind.apollo_mini:
            self.scales = torch.ones_like(self.row_counts)
            for column, squares in enumerate(self.backend.row_norms(clip)):
                norms[self.matrix_index, column] = self._sum_rows(squares)
        elif self.groups:
            self.scales, limited = self.backend.row_scales(clip)
            norms[self.matrix_index, 0] = self._sum_rows(limited)
        if self.adamw:
            updates = self.backend.adamw_update_norms(gradients, clip)
            norms[self.adamw_index, 0] = updates * self.adamw_counts
            for state in self.adamw_in_part:
                gradient = gradients[state.index].float() * clip
                update = state.candidate(gradient, self.counters.steps[self.places[state.index]], self.config)[2]
                norms[state.index, 0] = state.weight.square_norm(update)
        return norms


def _make_backend(bundle: Bundle) -> TorchBackend | TritonBackend:
    """Triton on CUDA, plain torch elsewhere. Triton is imported only here: a CPU install need not have it."""
    groups, adamw, config = bundle.groups, bundle.adamw, bundle.config
    if bundle.device.type != "cuda":
        return TorchBackend(groups, adamw, config)
    from apollo_tp.optim.triton_backend import TritonBackend

    return TritonBackend(groups, adamw, config, bundle.weights)


def projects(parameter: OptimParameter, config: OptimConfig) -> bool:
    """True if APOLLO projects this parameter; otherwise AdamW updates it."""
    shape = parameter.shard.global_shape
    role = parameter.role == "matrix" or (parameter.role == "embedding" and config.embeddings is EmbeddingMode.project)
    fits = len(shape) == 2 and min(shape) > moment_rank(config)
    return role and fits and config.kind is not OptimizerKind.adamw


@lru_cache(maxsize=1024)
def _bias_correction(step: int, beta1: float, beta2: float) -> float:
    return math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
