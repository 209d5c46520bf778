"""The local arithmetic of a step in plain torch: for CPU, and as the oracle of the Triton kernels in ``kernels``.

No collectives here. Both modules offer the same four functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig, OptimizerKind
from apollo_tp.optim.adamw import AdamWState
from apollo_tp.optim.matrices import Matrix, MatrixGroup


def project(group: MatrixGroup, gradients: Sequence[Tensor]) -> None:
    """Fill the group's ``all_projected`` and ``all_energy`` from local ``gradients`` (rows, columns), one per matrix."""
    group.new_buffers()
    for position, (matrix, gradient) in enumerate(zip(group.matrices, gradients, strict=True)):
        if group.exchanged and not matrix.represents:
            continue  # a replica's share of the sum is counted once
        by_channel = matrix.channels_first(gradient).float()
        projected = by_channel @ matrix.projection(group.rank) / math.sqrt(group.rank)
        energy = by_channel.square().sum(1)
        _place(group.all_projected, group.rows(position), projected)
        _place(group.all_energy, group.rows(position), energy)


def _place(buffer: Tensor, rows: slice, values: Tensor) -> None:
    """Deal ``values`` (channels, ...) over the ranks' blocks ``buffer[:, rows]``; the last block may be short."""
    per_rank = rows.stop - rows.start
    for rank in range(buffer.shape[0]):
        block = values[rank * per_rank : (rank + 1) * per_rank]
        buffer[rank, rows.start : rows.start + block.shape[0]] = block


def channel_scales(group: MatrixGroup, clip: Tensor, config: OptimConfig) -> Tensor:
    """Scale of each channel into ``group.scales``, without touching the moments; ``projected`` is clipped in place.

    ``clip`` is the 0-d clipping factor. Returns (matrices, 2) sums that must be added over ranks: the squared norm of the
    scaled gradient (and 0), or for APOLLO-Mini the squared norms of adapted and projected gradient.
    """
    beta1, beta2 = config.betas
    projected = group.projected.mul_(clip)
    m = group.exp_avg * beta1 + projected * (1 - beta1)
    v = group.exp_avg_sq * beta2 + projected.square() * (1 - beta2)
    adapted_sq = (m / (v.sqrt() + config.eps)).square().sum(1)
    projected_sq = projected.square().sum(1)
    if config.kind is OptimizerKind.apollo_mini:
        group.scales = torch.ones_like(group.energy)
        return torch.stack([group.segment_sum(adapted_sq), group.segment_sum(projected_sq)], dim=1)
    group.scales = adapted_sq.sqrt() / (projected_sq.sqrt() + 1e-8)
    limited = group.segment_sum(group.scales.square() * group.energy * clip.square())
    return torch.stack([limited, torch.zeros_like(limited)], dim=1)


def commit_moments(group: MatrixGroup, active: Sequence[bool], config: OptimConfig) -> None:
    """Move the moments of active matrices (one flag per matrix of the group)."""
    beta1, beta2 = config.betas
    for position, moves in enumerate(active):
        if moves:
            rows = group.rows(position)
            projected = group.projected[rows]
            group.exp_avg[rows] = group.exp_avg[rows] * beta1 + projected * (1 - beta1)
            group.exp_avg_sq[rows] = group.exp_avg_sq[rows] * beta2 + projected.square() * (1 - beta2)


def write_matrix(matrix: Matrix, gradient: Tensor, scales: Tensor, coefficient: float, decay: float, step: int) -> None:
    """W <- decay W - coefficient * scales * G, in place. ``scales`` holds the channels of the local weight, fp32."""
    factor = scales * coefficient
    by_row = factor[:, None] if matrix.channel_dim == 0 else factor[None, :]

    def update(rows: slice) -> Tensor:
        return gradient[rows].float() * (by_row[rows] if matrix.channel_dim == 0 else by_row)

    matrix.weight.apply(step, decay, update)


def adamw_update_norm(state: AdamWState, gradient: Tensor, clip: Tensor, step: int, config: OptimConfig) -> Tensor:
    """Squared norm (0-d) of the update that AdamW would make, learning rate 1; nothing is changed."""
    return state.candidate(gradient.float() * clip, step, config)[2].square().sum()


def write_adamw(
    state: AdamWState, gradient: Tensor, clip: float, lr: float, decay: float, step: int, config: OptimConfig
) -> None:
    """Move the moments and write the weight; ``step`` counts this parameter's updates from 0."""
    m, v, update = state.candidate(gradient.float() * clip, step, config)
    state.exp_avg.copy_(m)
    state.exp_avg_sq.copy_(v)
    state.weight.apply(step, decay, lambda rows: update[rows] * lr)
