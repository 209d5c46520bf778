"""Parameters that are decided together: from local gradients to a decision that all ranks share, and then the write.

The optimizer has one group of all parameters, which owns their state. For updates inside the backward pass, the matrices
whose gradients are freed together are a *subset* of it: an update group of its own that shares the state, so that each step
may take the one or the other way. The order within a group:
    1. project every matrix (one read of its gradient), which also gives the squared norm of each channel;
    2. sum what crosses ranks: one reduce-scatter per bucket of matrices cut along their contracted dimension, one all-gather
       of their channel scales, and last all scalars in one all-reduce (clipping needs the global norm first: one more, of
       one float per parameter);
    3. decide from the summed scalars alone, so that every rank decides the same;
    4. only then move moments and write weights.
Each collective of step 2 carries a canary, and the last one adds up what every rank found in those before it: no rank writes
if one of them did not happen somewhere, or if this rank's communicators were aborted before it decides (``TPGroup.intact``).
Between decision and write nothing more crosses ranks.

A parameter has one number in a group, its *index*: its position in ``weights``, in every list of gradients and in every
vector [N] of the group (letters of shapes as in ``sharding``). Only ``Counters`` are numbered as in the group of all
parameters; ``indices`` leads there.
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
from apollo_tp.optim.owners import agree_over_replicas
from apollo_tp.optim.parameters import AdamWState, OptimParameter, Weight, to_device
from apollo_tp.optim.sharding import (
    ChannelScales,
    Decision,
    DecisionInputs,
    GradientStats,
    Matrix,
    make_groups,
    moment_rank,
    refresh_projections,
)
from apollo_tp.optim.torch_backend import TorchBackend

if TYPE_CHECKING:
    from apollo_tp.optim.triton_backend import TritonBackend

BUCKET_BYTES = 64 * 2**20
"""Upper bound of one reduce-scatter's buffer; a single larger matrix gets a bucket of its own."""


class Counters:
    """Of all parameters of a model: updates so far, and fp64 norms of the limiter and of the weights, on the device."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.steps = [0] * count
        self.limiter_norms = torch.zeros(count, dtype=torch.float64, device=device)
        self.weight_norms = torch.full((count,), math.inf, dtype=torch.float64, device=device)


class UpdateGroup:
    """Parameters with their state on this rank, complete from construction on (same keys on every rank).

    ``matrices`` and ``adamw`` hold the parameters of either kind by index. With ``parent``, ``weights`` are some of that
    group's, in any order, and all state is the parent's: ``counters``, and views of its moments. ``indices`` are theirs in
    ``counters``. With ``replicas`` (R ranks), the update groups of the other replicas hold the other parameters of the
    model, and all write or none.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        config: OptimConfig,
        tp: TPGroup,
        parent: UpdateGroup | None = None,
        replicas: TPGroup | None = None,
    ) -> None:
        self.weights, self.config, self.tp = list(weights), config, tp
        self.replicas = replicas or TPGroup.single()
        self.device = weights[0].data.device
        if parent is None:
            self._allocate()
        else:
            self._share(parent)
        self._place_rows()
        self.backend = self._make_backend()
        self.ones = self.vector([1.0]).float()
        self._constants = self._decision_constants()
        self.adamw_index = torch.tensor(list(self.adamw), dtype=torch.int64, device=self.device)
        self.adamw_ownership = self.vector([float(a.weight.is_owner) for a in self.adamw.values()]).float()
        # few: in plain torch everywhere. Of ``unprojected`` this rank has a copy that is written but not projected
        self.unprojected = {i: m.weight for i, m in self.matrices.items() if not m.projects_here}
        self.partly_owned = {i: a for i, a in self.adamw.items() if a.weight.ownership_mask is not None}

    def _allocate(self) -> None:
        """State of its own: zero moments, and a counter for each parameter."""
        config, tp, weights = self.config, self.tp, dict(enumerate(self.weights))
        self.indices, self.counters = list(weights), Counters(self.device, len(weights))
        self.matrices = {i: Matrix(w, config, tp) for i, w in weights.items() if projects(w.parameter, config)}
        self.adamw = {i: AdamWState(w) for i, w in weights.items() if i not in self.matrices}
        self.groups = make_groups(self.matrices, moment_rank(config), tp, BUCKET_BYTES)

    def _share(self, parent: UpdateGroup) -> None:
        """The state of ``parent``, as far as it is of these weights."""
        index_of = {id(weight): i for i, weight in enumerate(parent.weights)}
        theirs = [index_of[id(weight)] for weight in self.weights]
        self.indices, self.counters = [parent.indices[j] for j in theirs], parent.counters
        self.matrices = {i: parent.matrices[j] for i, j in enumerate(theirs) if j in parent.matrices}
        self.adamw = {i: parent.adamw[j] for i, j in enumerate(theirs) if j in parent.adamw}
        new_index = {j: i for i, j in enumerate(theirs)}
        self.groups = [subset for group in parent.groups for subset in group.subsets(new_index)]

    def _place_rows(self) -> None:
        """Where the rows of moments of each group lie among those of all, and what their sums by matrix need."""
        first_rows = list(itertools.accumulate((g.num_rows for g in self.groups), initial=0))
        for group, first_row in zip(self.groups, first_rows[:-1], strict=True):
            group.first_row = first_row
        if self.groups:
            self.matrix_index = torch.cat([g.index for g in self.groups])
            self.row_ownership = torch.cat([g.row_ownership for g in self.groups])
            self.row_lengths = torch.cat([g.lengths for g in self.groups])
        self.local_rows = sum(g.num_rows for g in self.groups if not g.exchanged)  # groups without exchange come first
        exchanged = [member for g in self.groups if g.exchanged for member in g.members]
        starts = itertools.accumulate((member.matrix.per_rank for member in exchanged), initial=0)
        self.gather_starts = {member.index: start for member, start in zip(exchanged, starts, strict=False)}

    def _make_backend(self) -> TorchBackend | TritonBackend:
        """Triton on CUDA, plain torch elsewhere. Triton is imported only here: a CPU install need not have it."""
        if self.device.type != "cuda":
            return TorchBackend(self.groups, self.adamw, self.config)
        from apollo_tp.optim.triton_backend import TritonBackend

        return TritonBackend(self.groups, self.adamw, self.config, self.weights)

    def _decision_constants(self) -> dict[str, Tensor]:
        """The fields of ``DecisionInputs`` that no step changes; norms are changed in place."""
        kinds = {i: 2 if m.weight.parameter.role == "matrix" else 1 for i, m in self.matrices.items()}
        root_scales = {i: m.root_scale for i, m in self.matrices.items()}
        all_indices = range(len(self.weights))
        return {
            "projected": self.vector([kinds.get(i, 0) for i in all_indices]).int(),
            "root_scales": self.vector([root_scales.get(i, 1.0) for i in all_indices]),
            "indices": torch.tensor(self.indices, device=self.device),
            "limiter_norms": self.counters.limiter_norms,
            "weight_norms": self.counters.weight_norms,
            "expected_checks": self.vector(self._expected_checks()).float(),
        }

    def _expected_checks(self) -> list[float]:
        """What the canaries of a step are once they are summed over ranks, in the order of ``_decide``."""
        size, num_exchanges = self.tp.size, sum(group.exchanged for group in self.groups)
        clips = self.config.max_grad_norm is not None
        expected = [size, size] + [size * size] * (num_exchanges + clips)
        expected += [size * self.replicas.size] * (clips and self.replicas.size > 1)
        return [float(n) for n in (*expected, *([size] * size if self._gathers else []))]

    @property
    def _gathers(self) -> bool:
        """Whether ranks need channel scales of each other: APOLLO-Mini's are all 1."""
        return self.config.kind is OptimizerKind.apollo and any(group.exchanged for group in self.groups)

    @property
    def steps(self) -> list[int]:
        """Updates of each parameter; a step with zero gradient is none."""
        return [self.counters.steps[index] for index in self.indices]

    def vector(self, values: Sequence[float]) -> Tensor:
        """fp64 [len(values)] on the device, without waiting for it."""
        return to_device(values, torch.float64, self.device)

    def subset(self, weights: Sequence[Weight]) -> UpdateGroup:
        """A group of some of the ``weights`` of this one, over the same state: either may update them. No collective."""
        return UpdateGroup(weights, self.config, self.tp, parent=self)

    def update(
        self,
        lr: float,
        loss: Tensor | None = None,
        alive: Tensor | None = None,
        received: Tensor | None = None,
        gradients: list[Tensor] | None = None,
    ) -> Decision:
        """Decide and, if so decided, write. Nothing is written on any rank unless ``alive`` and ``received`` (fp32 [1]) are
        1 on all: no earlier part of the step forbids it, and what this rank got from others before has arrived.

        The counters follow in ``accept``, once the decision has been read. Collectives: see the module.
        """
        gradients = gradients or [weight.gradient() for weight in self.weights]
        flags = [self.ones if flag is None else flag for flag in (alive, received)]
        decision, scales = self._decide(gradients, lr, loss, *flags)
        decision.send_report()
        self.backend.write(gradients, decision, scales)
        for group in self.groups:
            group.release()
        return decision

    def accept(self, written: Sequence[bool]) -> None:
        """Count the updates that a decision made; ``written`` [N]."""
        for index, moved in zip(self.indices, written, strict=True):
            self.counters.steps[index] += moved

    def local_square_norms(self) -> Tensor:
        """fp32 [N]: squared norm of what this rank owns of each weight; 0 for those of one dimension. No collective."""
        zero = torch.zeros((), device=self.device)
        return torch.stack([w.owned_square_norm(w.data) if w.is_matrix else zero for w in self.weights])

    def _decide(
        self, gradients: list[Tensor], lr: float, loss: Tensor | None, alive: Tensor, received: Tensor
    ) -> tuple[Decision, ChannelScales]:
        """Steps 1 to 3. Touches neither moments nor weights."""
        config, steps = self.config, self.steps
        due = [steps[i] // config.refresh_every for i in self.matrices]
        refresh_projections(list(self.matrices.values()), due, config)
        self.backend.project(self._owned_once(gradients))  # first: the device is busy while the host prepares the rest
        inputs = self._decision_inputs(lr, steps)
        self.backend.begin(gradients, lr, steps, inputs.steps)
        squares = local_squares = self._local_square_sums(gradients, loss)
        for group in self.groups:
            group.exchange()
        if (intact := self.tp.peers.intact) is not None:
            received = received * intact  # no sum of the forward or backward pass was given up
        checks = [self.ones, received, *(group.canary for group in self.groups if group.exchanged)]
        clip = self.ones[0]
        if config.max_grad_norm is not None:
            squares, counted = self.tp.all_reduce_(torch.cat([squares, self.ones])).tensor_split([-1])
            checks.append(counted)
            total = squares[:-1].sum()
            if self.replicas.size > 1:
                total, counted = self.replicas.all_reduce_(torch.stack([total, self.ones[0]])).unbind()
                checks.append(counted[None])
            clip = (config.max_grad_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
        norms, local_scales = self._update_norms(gradients, clip)
        scales = self._gather_scales(local_scales)
        if self._gathers:
            assert scales.gathered is not None
            checks.append(scales.gathered[:, -1])
        checks[1] = received * self._intact()  # no sum or gather either
        parts = [norms.flatten(), alive, torch.cat(checks)]
        if config.max_grad_norm is None:
            parts.append(squares)
        packed = self.tp.all_reduce_(torch.cat(parts)).split([part.numel() for part in parts])
        if config.max_grad_norm is None:
            squares = packed[3]
        sums = packed[2] * self._intact()  # an aborted collective may leave what looks right
        stats = GradientStats(local_squares, squares, packed[0].view_as(norms), clip, alive=packed[1], checks=sums)
        if self.replicas.size == 1:
            return self.backend.decide(stats, inputs), scales
        before = inputs.limiter_norms.clone()
        return agree_over_replicas(self.backend.decide(stats, inputs), inputs, before, self.replicas), scales

    def _intact(self) -> Tensor:
        """See ``TPGroup.intact``; one process has nothing to abort."""
        return self.ones if self.tp.size == self.replicas.size == 1 else self.tp.intact(self.device)

    def _decision_inputs(self, lr: float, steps: Sequence[int]) -> DecisionInputs:
        """Two small copies to the device."""
        numbers = self.vector([lr, *(_bias_correction(n + 1, *self.config.betas) for n in steps)])
        return DecisionInputs(
            **self._constants,
            corrections=numbers[1:],
            steps=to_device(steps, torch.int32, self.device),
            learning_rate=numbers[0],
        )

    def _owned_once(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients to project: where partial projections are summed, zero in what another rank owns. The same list if
        there is no such matrix."""
        masks = {i: m.weight.ownership_mask for i, m in self.matrices.items() if m.exchanged}
        masks = {i: mask for i, mask in masks.items() if mask is not None}
        if not masks:
            return gradients
        return [g if (mask := masks.get(i)) is None else g * mask.to(g.dtype) for i, g in enumerate(gradients)]

    def _sum_rows(self, values: Tensor) -> Tensor:
        """fp32 [rows of all groups] summed by matrix, [matrices of all groups], each channel by the rank that owns it."""
        return torch.segment_reduce(values * self.row_ownership, "sum", lengths=self.row_lengths, unsafe=True)

    def _gather_scales(self, local: Tensor) -> ChannelScales:
        """The channel scales of all matrices from those of this rank's rows, fp32 [rows of all groups].

        Collective: one all-gather if a matrix is exchanged, each rank's part with a canary of 1.
        """
        exchanged = local[self.local_rows :]
        if not exchanged.numel():
            return ChannelScales(local, None, {})
        if not self._gathers:
            ones = exchanged.new_ones(self.tp.size, exchanged.numel() + 1)
            return ChannelScales(local, ones, self.gather_starts)
        gathered = self.tp.all_gather(torch.cat([exchanged, self.ones])).view(self.tp.size, -1)
        return ChannelScales(local, gathered, self.gather_starts)

    def _local_square_sums(self, gradients: list[Tensor], loss: Tensor | None) -> Tensor:
        """fp32 [N + 1]: squared norm of what this rank owns of each gradient; last, NaN if the loss is not finite, else
        0."""
        sums = torch.zeros(len(self.weights) + 1, device=self.device)
        if self.groups:
            energies = [g.all_energy.sum(0) if g.exchanged else g.all_energy[0] for g in self.groups]
            sums[self.matrix_index] = self._sum_rows(torch.cat(energies))
        if self.adamw:
            sums[self.adamw_index] = self.backend.adamw_square_sums(gradients) * self.adamw_ownership
            for i, state in self.partly_owned.items():
                sums[i] = state.weight.owned_square_norm(gradients[i])
        for i, weight in self.unprojected.items():
            sums[i] += weight.owned_square_norm(gradients[i])  # 0, or NaN: another rank's copy may be finite
        if loss is not None:
            sums[-1] = torch.where(torch.isfinite(loss.detach()), 0.0, torch.nan).to(self.device)
        return sums

    def _update_norms(self, gradients: list[Tensor], clip: Tensor) -> tuple[Tensor, Tensor]:
        """(norms, scales): norms, fp32 [N, 2], of what this rank owns: what the limiter and the limit on the size of a step
        need; scales, fp32 [rows of all groups], of this rank's rows.

        Channel scaling: squared norm of the scaled, clipped gradient. APOLLO-Mini: the squared norms of adapted and
        projected gradient. AdamW: squared norm of the update at learning rate 1.
        """
        norms, scales = torch.zeros(len(self.weights), 2, device=self.device), torch.empty(0, device=self.device)
        if self.groups:
            first, second = self.backend.row_stats(clip)
            if self.config.kind is OptimizerKind.apollo_mini:
                scales = torch.ones_like(self.row_ownership)
                norms[self.matrix_index, 0] = self._sum_rows(first)
                norms[self.matrix_index, 1] = self._sum_rows(second)
            else:
                scales = first
                norms[self.matrix_index, 0] = self._sum_rows(second)
        if self.adamw:
            updates = self.backend.adamw_update_norms(gradients, clip)
            norms[self.adamw_index, 0] = updates * self.adamw_ownership
            for i, state in self.partly_owned.items():
                gradient = gradients[i].float() * clip
                update = state.candidate(gradient, self.counters.steps[self.indices[i]], self.config)[2]
                norms[i, 0] = state.weight.owned_square_norm(update)
        return norms, scales


def projects(parameter: OptimParameter, config: OptimConfig) -> bool:
    """True if APOLLO projects this parameter; otherwise AdamW updates it."""
    shape = parameter.shard.global_shape
    role = parameter.role == "matrix" or (parameter.role == "embedding" and config.embeddings is EmbeddingMode.project)
    fits = len(shape) == 2 and min(shape) > moment_rank(config)
    return role and fits and config.kind is not OptimizerKind.adamw


@lru_cache(maxsize=1024)
def _bias_correction(step: int, beta1: float, beta2: float) -> float:
    """Factor of Adam's update in its ``step``-th step, counted from 1."""
    return math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
