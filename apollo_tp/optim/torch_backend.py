"""The local arithmetic of a step in plain torch: for CPU, and as the oracle of the Triton kernels.

No collectives here. ``triton_backend.TritonBackend`` offers the same methods for CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig
from apollo_tp.optim.adamw import AdamWState
from apollo_tp.optim.decide import decide
from apollo_tp.optim.interface import Decision, Facts, Scales, Sums
from apollo_tp.optim.sharding import Matrix, MatrixGroup


class TorchBackend:
    """Works on the groups and AdamW states that the optimizer owns; ``gradients`` are LOCAL, (rows, columns), by index."""

    def __init__(self, groups: Sequence[MatrixGroup], adamw: Sequence[AdamWState], config: OptimConfig) -> None:
        self.groups, self.adamw, self.config = groups, adamw, config

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        """Nothing to prepare."""

    def begin(self, learning_rate: float, steps: Sequence[int], steps_on_device: Tensor) -> None:
        """Numbers of this step, for ``adamw_update_norms`` and ``write``: each parameter's updates before it."""
        self.steps = steps

    def project(self, gradients: Sequence[Tensor]) -> None:
        """Fill ``all_projected`` and ``all_energy`` of every group."""
        for group in self.groups:
            group.use(torch.zeros(group.buffer_shape, device=group.device))
            for position, matrix in enumerate(group.matrices):
                if group.exchanged and not matrix.weight.represents:
                    continue  # a replica's share of the sum is counted once
                by_channel = matrix.channels_first(gradients[matrix.index]).float()
                projected = by_channel @ matrix.projection(group.rank) / math.sqrt(group.rank)
                _deal(projected, group.all_projected, group.rows(position))
                _deal(by_channel.square().sum(1), group.all_energy, group.rows(position))

    def row_norms(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norms of adapted and of projected gradient, (rows of all groups,). ``clip`` is 0-d. No moment moves."""
        norms = [self._row_norms(group, clip) for group in self.groups]
        return torch.cat([adapted for adapted, _ in norms]), torch.cat([projected for _, projected in norms])

    def _row_norms(self, group: MatrixGroup, clip: Tensor) -> tuple[Tensor, Tensor]:
        projected = group.projected * clip
        m, v = self._moments(group.exp_avg, group.exp_avg_sq, projected)
        return (m / (v.sqrt() + self.config.eps)).square().sum(1), projected.square().sum(1)

    def row_scales(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Channel scales, and the squared norm of each scaled, clipped channel, (rows of all groups,). No moment moves."""
        adapted_sq, projected_sq = self.row_norms(clip)
        scales = adapted_sq.sqrt() / (projected_sq.sqrt() + 1e-8)
        return scales, scales.square() * torch.cat([group.energy for group in self.groups]) * clip.square()

    def _moments(self, exp_avg: Tensor, exp_avg_sq: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.config.betas
        return exp_avg * beta1 + projected * (1 - beta1), exp_avg_sq * beta2 + projected.square() * (1 - beta2)

    def adamw_square_sums(self, gradients: Sequence[Tensor]) -> Tensor:
        """Squared norm of each AdamW parameter's local gradient."""
        return torch.stack([gradients[state.index].float().square().sum() for state in self.adamw])

    def adamw_update_norms(self, gradients: Sequence[Tensor], clip: Tensor) -> Tensor:
        """Squared norm of each local AdamW update at learning rate 1."""
        norms = []
        for state in self.adamw:
            gradient = gradients[state.index].float() * clip
            norms.append(state.candidate(gradient, self.steps[state.index], self.config)[2].square().sum())
        return torch.stack(norms)

    def decide(self, learning_rate: float, sums: Sums, facts: Facts) -> Decision:
        """See ``decide.decide``."""
        return decide(learning_rate, sums, facts, self.config)

    def write(self, gradients: Sequence[Tensor], decision: Decision, scales: Scales) -> None:
        """Move moments and write weights where ``decision.write`` says so."""
        steps = self.steps
        write, coefficients = decision.write.tolist(), decision.coefficients.tolist()
        decay = 1.0 - decision.learning_rate * self.config.weight_decay
        for group in self.groups:
            for position, matrix in enumerate(group.matrices):
                i = matrix.index
                if write[i]:
                    self._commit(group, group.rows(position), decision.clip)
                    factor = scales.of(group, position) * coefficients[i]
                    _write_matrix(matrix, gradients[i], factor, decay, steps[i])
        for state in self.adamw:
            i = state.index
            if write[i]:
                gradient = gradients[i].float() * decision.clip
                m, v, update = state.candidate(gradient, steps[i], self.config)
                state.exp_avg.copy_(m)
                state.exp_avg_sq.copy_(v)
                rate = decay if state.weight.is_matrix else 1.0
                update.mul_(decision.learning_rate)
                state.weight.apply(steps[i], rate, update.__getitem__)

    def _commit(self, group: MatrixGroup, rows: slice, clip: Tensor) -> None:
        m, v = self._moments(group.exp_avg[rows], group.exp_avg_sq[rows], group.projected[rows] * clip)
        group.exp_avg[rows], group.exp_avg_sq[rows] = m, v


def _deal(values: Tensor, buffer: Tensor, rows: slice) -> None:
    """Deal ``values`` (channels, ...) over the ranks' blocks ``buffer[:, rows]``; the last blocks may be short."""
    per_rank = rows.stop - rows.start
    for rank in range(buffer.shape[0]):
        block = values[rank * per_rank : (rank + 1) * per_rank]
        buffer[rank, rows.start : rows.start + block.shape[0]] = block


def _write_matrix(matrix: Matrix, gradient: Tensor, factor: Tensor, decay: float, step: int) -> None:
    """W <- decay W - factor * G, in place; ``factor`` (local channels,) fp32."""

    def update(rows: slice) -> Tensor:
        by_row = factor[rows, None] if matrix.channel_dim == 0 else factor[None, :]
        return gradient[rows].float() * by_row

    matrix.weight.apply(step, decay, update)
