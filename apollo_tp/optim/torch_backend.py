"""The local arithmetic of a step in plain torch: for CPU, and as the oracle of the Triton kernels.

``triton_backend.TritonBackend`` offers the same methods for CUDA. Letters of shapes as in ``sharding``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig, OptimizerKind
from apollo_tp.optim.parameters import AdamWState
from apollo_tp.optim.sharding import (
    ChannelScales,
    Decision,
    DecisionInputs,
    GradientStats,
    Matrix,
    MatrixGroup,
)


def decide(stats: GradientStats, inputs: DecisionInputs, config: OptimConfig) -> Decision:
    """Which parameters to write, with which coefficients. Changes ``inputs.limiter_norms``; no collective, in fp64.

    The norm of a matrix's update is limited to ``norm_growth_limit`` times what the limiter let through the last time
    (APOLLO, arXiv 2412.05270, section 4, and its published code), but for embedding and head: what a batch moves of these
    grows with its number of tokens, and a short one would hold up those after it. Nothing is written if a canary is not
    what it must be, a sum is not finite, or a matrix would move by more than ``max_relative_update`` of its norm. Only
    finite sums give finite coefficients.

    Tensors in, tensors out, and no branch on a value: ``torch.compile`` takes it as one graph.
    """
    projected, limited, squares = inputs.projected > 0, inputs.projected > 1, stats.squares[:-1].double()
    one = torch.ones_like(inputs.corrections)
    norm, inner = stats.norms[:, 0].double().sqrt(), one
    if config.kind is OptimizerKind.apollo_mini:
        mini = norm / (stats.norms[:, 1].double().sqrt() + 1e-8)
        inner = torch.where(projected, mini, inner)
        norm = torch.where(projected, mini * stats.clip * squares.sqrt(), norm)
    excess, old = one, inputs.limiter_norms[inputs.indices]
    if config.norm_growth_limit is not None:
        gamma = config.norm_growth_limit
        excess = (norm / (old + 1e-8)).clamp(min=gamma) / gamma
        excess = torch.where((inputs.steps > 0) & limited, excess, one)
    rate = inputs.learning_rate
    factor = torch.where(projected, rate * inputs.corrections * inputs.root_scales, rate) / excess
    active = squares > 0
    relative = torch.where(active, factor * norm / inputs.weight_norms[inputs.indices], 0.0)
    finite = torch.isfinite(stats.squares).all() & torch.isfinite(stats.norms).all()
    checked = (stats.checks == inputs.expected_checks).all()
    good = checked & finite & (relative <= config.max_relative_update).all()
    write = active & good & (stats.alive == inputs.expected_checks[0])
    inputs.limiter_norms[inputs.indices] = torch.where(write, norm / excess, old)
    report = [checked[None], finite[None], squares.sum()[None], write, relative]
    return Decision(
        clip=stats.clip,
        write=write.to(torch.int32),
        coefficients=(factor * inner * stats.clip).float(),
        good=good.to(torch.int32),
        report=torch.cat([part.double() for part in report]),
        local_squares=stats.local_squares,
    )


class TorchBackend:
    """The local arithmetic of a step, in the order of the methods. No collectives.

    Works on matrix groups and AdamW states (by index) that the update group owns. ``gradients`` are local, one [R, C] per
    parameter by index, in the parameter's dtype, with contiguous rows. ``clip`` is fp32, 0-d. No method but ``write``
    touches moments or weights.
    """

    def __init__(self, groups: Sequence[MatrixGroup], adamw: Mapping[int, AdamWState], config: OptimConfig) -> None:
        self.groups, self.adamw, self.config = groups, adamw, config

    def project(self, gradients: Sequence[Tensor]) -> None:
        """Fill the buffers of every matrix group: ``all_projected`` [ranks, R, r] with the projected gradients of this rank
        and ``all_energy`` [ranks, R] with squared norms of channels, fp32, the channels in blocks by the rank that keeps
        them. Elements of ``gradients`` that another rank puts into the sum are zero."""
        for group in self.groups:
            group.use(torch.zeros(group.buffer_shape, device=group.device))
            for member in group.members:
                matrix = member.matrix
                if not matrix.projects_here:
                    continue
                by_channel = matrix.channels_first(gradients[member.index]).float()
                projected = by_channel @ matrix.projection(group.rank) / math.sqrt(group.rank)
                _scatter(projected, group.all_projected, member.rows)
                _scatter(by_channel.square().sum(1), group.all_energy, member.rows)

    def begin(
        self, gradients: Sequence[Tensor], learning_rate: float, steps: Sequence[int], steps_on_device: Tensor
    ) -> None:
        """What the methods below work on. ``steps`` (also int32 [N] on the device): updates of each parameter before this
        one. Called after ``project``, so that a device is busy while the host prepares this."""
        self.learning_rate, self.steps = learning_rate, steps

    def adamw_square_sums(self, gradients: Sequence[Tensor]) -> Tensor:
        """fp32 [AdamW parameters]: squared norm of each one's local gradient."""
        return torch.stack([gradients[i].float().square().sum() for i in self.adamw])

    def row_stats(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Two vectors, fp32 [rows of all groups], of the clipped gradient, after ``MatrixGroup.exchange``.

        Channel scaling: the channel's scale, and the squared norm of the scaled channel. APOLLO-Mini: the squared norms of
        the adapted and of the projected gradient.
        """
        norms = [self._row_norms(group, clip) for group in self.groups]
        adapted_sq, projected_sq = (torch.cat(column) for column in zip(*norms, strict=True))
        if self.config.kind is OptimizerKind.apollo_mini:
            return adapted_sq, projected_sq
        scales = adapted_sq.sqrt() / (projected_sq.sqrt() + 1e-8)
        return scales, scales.square() * torch.cat([group.energy for group in self.groups]) * clip.square()

    def _row_norms(self, group: MatrixGroup, clip: Tensor) -> tuple[Tensor, Tensor]:
        projected = group.projected * clip
        m, v = self._moments(group.exp_avg, group.exp_avg_sq, projected)
        return (m / (v.sqrt() + self.config.eps)).square().sum(1), projected.square().sum(1)

    def _moments(self, exp_avg: Tensor, exp_avg_sq: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.config.betas
        return exp_avg * beta1 + projected * (1 - beta1), exp_avg_sq * beta2 + projected.square() * (1 - beta2)

    def adamw_update_norms(self, gradients: Sequence[Tensor], clip: Tensor) -> Tensor:
        """fp32 [AdamW parameters]: squared norm of each local update at learning rate 1."""
        norms = []
        for i, state in self.adamw.items():
            gradient = gradients[i].float() * clip
            norms.append(state.candidate(gradient, self.steps[i], self.config)[2].square().sum())
        return torch.stack(norms)

    def decide(self, stats: GradientStats, inputs: DecisionInputs) -> Decision:
        """See ``decide``."""
        return decide(stats, inputs, self.config)

    def write(self, gradients: Sequence[Tensor], decision: Decision, scales: ChannelScales) -> None:
        """Move moments and write weights where ``decision.write`` says so."""
        write, coefficients = decision.write.tolist(), decision.coefficients.tolist()
        decay = 1.0 - self.learning_rate * self.config.weight_decay
        for group in self.groups:
            for member in group.members:
                i = member.index
                if write[i]:
                    self._commit(group, member.rows, decision.clip)
                    factor = scales.of(group, member) * coefficients[i]
                    _write_matrix(member.matrix, gradients[i], factor, decay, self.steps[i])
        for i, state in self.adamw.items():
            if write[i]:
                gradient = gradients[i].float() * decision.clip
                m, v, update = state.candidate(gradient, self.steps[i], self.config)
                state.exp_avg.copy_(m)
                state.exp_avg_sq.copy_(v)
                rate = decay if state.weight.is_matrix else 1.0
                update.mul_(self.learning_rate)
                state.weight.apply(self.steps[i], rate, update.__getitem__)

    def _commit(self, group: MatrixGroup, rows: slice, clip: Tensor) -> None:
        m, v = self._moments(group.exp_avg[rows], group.exp_avg_sq[rows], group.projected[rows] * clip)
        group.exp_avg[rows], group.exp_avg_sq[rows] = m, v


def _scatter(values: Tensor, buffer: Tensor, rows: slice) -> None:
    """Distribute ``values`` [channels, ...] over the ranks' blocks ``buffer[:, rows]``; the last blocks may be short."""
    per_rank = rows.stop - rows.start
    for rank in range(buffer.shape[0]):
        block = values[rank * per_rank : (rank + 1) * per_rank]
        buffer[rank, rows.start : rows.start + block.shape[0]] = block


def _write_matrix(matrix: Matrix, gradient: Tensor, factor: Tensor, decay: float, step: int) -> None:
    """W <- decay W - factor * G, in place; ``factor`` is fp32 [channels_local]."""

    def update(rows: slice) -> Tensor:
        by_row = factor[rows, None] if matrix.channel_dim == 0 else factor[None, :]
        return gradient[rows].float() * by_row

    matrix.weight.apply(step, decay, update)
