"""The plain single-process twin: whole fp32 tensors, one at a time, no sharding, no batching, no kernels.

Written from the mathematics of APOLLO (arXiv 2412.05270, Algorithm 1, Eq. 4) and the decoupled AdamW; it is what the
sharded optimizer is tested against and reads top to bottom as the definition of an update. Differences from the paper's
published code are listed in docs/explanation/optimizer.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apollo_tp.config import EmbeddingMode, OptimConfig, OptimizerKind
from apollo_tp.optim.optimizer import learning_rate
from apollo_tp.optim.projection import gaussian, sign_words, stream_key, unpack_signs


@dataclass
class _State:
    step: int = 0
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    limiter_norm: float = 0.0


@dataclass
class ReferenceOptimizer:
    """Updates ``weights`` (name -> whole fp32 tensor) in place. ``roles`` as in OptimParameter."""

    config: OptimConfig
    weights: Mapping[str, Tensor]
    roles: Mapping[str, str]
    step_count: int = 0
    state: dict[str, _State] = field(default_factory=dict)

    def step(self, gradients: Mapping[str, Tensor], learning_rate_scale: float = 1.0) -> str:
        """One step; returns why it was skipped, or ""."""
        trained = {name: gradients[name].float() for name in self.weights if self._kind(name) != "frozen"}
        if not all(bool(torch.isfinite(g).all()) for g in trained.values()):
            return "not finite"
        norm = math.sqrt(sum(float(g.square().sum()) for g in trained.values()))
        clip = 1.0 if self.config.max_grad_norm is None else min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        lr = learning_rate(self.config, self.step_count) * learning_rate_scale
        plan = {name: self._update(name, g * clip) for name, g in trained.items() if bool(g.any())}
        for name, (_, update) in plan.items():
            weight = self.weights[name]
            if (
                weight.ndim > 1
                and weight.any()
                and lr * update.norm() > self.config.max_relative_update * weight.norm()
            ):
                return f"{name} would move by too much"
        for name, (state, update) in plan.items():
            self.state[name] = state
            if self.weights[name].ndim > 1:
                self.weights[name].mul_(1.0 - lr * self.config.weight_decay)
            self.weights[name].sub_(lr * update)
        self.step_count += 1
        return ""

    def _kind(self, name: str) -> str:
        shape, embeddings = self.weights[name].shape, self.config.embeddings
        if self.roles[name] == "embedding" and embeddings is EmbeddingMode.frozen:
            return "frozen"
        project = self.roles[name] == "matrix" or (
            self.roles[name] == "embedding" and embeddings is EmbeddingMode.project
        )
        fits = len(shape) == 2 and min(shape) > self._rank
        return "project" if project and fits and self.config.kind is not OptimizerKind.adamw else "adamw"

    @property
    def _rank(self) -> int:
        return 1 if self.config.kind is OptimizerKind.apollo_mini else self.config.rank

    def _moments(self, name: str, gradient: Tensor) -> _State:
        old, (beta1, beta2) = self.state.get(name, _State()), self.config.betas
        m = torch.zeros_like(gradient) if old.exp_avg is None else old.exp_avg
        v = torch.zeros_like(gradient) if old.exp_avg_sq is None else old.exp_avg_sq
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient.square()
        return _State(old.step + 1, m, v, old.limiter_norm)

    def _update(self, name: str, gradient: Tensor) -> tuple[_State, Tensor]:
        """The state after the step and the tensor that the learning rate multiplies."""
        if self._kind(name) == "adamw":
            return self._adamw(name, gradient)
        return self._apollo(name, gradient)

    def _adamw(self, name: str, gradient: Tensor) -> tuple[_State, Tensor]:
        state, (beta1, beta2) = self._moments(name, gradient), self.config.betas
        assert state.exp_avg is not None
        assert state.exp_avg_sq is not None
        corrected = (state.exp_avg_sq / (1 - beta2**state.step)).sqrt() + self.config.eps
        return state, state.exp_avg / (1 - beta1**state.step) / corrected

    def _apollo(self, name: str, gradient: Tensor) -> tuple[_State, Tensor]:
        config, rank = self.config, self._rank
        rows_are_channels = gradient.shape[0] >= gradient.shape[1]
        by_channel = gradient if rows_are_channels else gradient.T  # (big, small)
        small = by_channel.shape[1]
        refresh = self.state.get(name, _State()).step // config.refresh_every
        matrix = projection_matrix(config.seed, name, refresh, torch.arange(small), rank, config.projection.value)
        projected = by_channel @ matrix.to(by_channel.device)  # (big, rank)
        state = self._moments(name, projected)
        assert state.exp_avg is not None
        assert state.exp_avg_sq is not None
        adapted = state.exp_avg / (state.exp_avg_sq.sqrt() + config.eps)
        if config.kind is OptimizerKind.apollo_mini:
            scales = adapted.norm() / (projected.norm() + 1e-8)
        else:
            scales = (adapted.norm(dim=1) / (projected.norm(dim=1) + 1e-8))[:, None]
        update = by_channel * scales
        if config.norm_growth_limit is not None and self.roles[name] == "matrix":
            norm, gamma = float(update.norm()), config.norm_growth_limit
            if state.step > 1:
                excess = max(norm / (state.limiter_norm + 1e-8), gamma) / gamma
                update, norm = update / excess, norm / excess
            state.limiter_norm = norm
        beta1, beta2 = config.betas
        bias = math.sqrt(1 - beta2**state.step) / (1 - beta1**state.step)
        scale = small / rank if config.scale == "auto" else float(config.scale)
        update = update * (bias * math.sqrt(scale))
        return state, update if rows_are_channels else update.T


def projection_matrix(seed: int, name: str, refresh: int, columns: Tensor, rank: int, kind: str) -> Tensor:
    """The projection of ``name``, fp32 [columns, r], entries of variance 1 / r: Rademacher or Gaussian.

    ``columns`` are global indices along the contracted (smaller) dimension of the checkpoint tensor. The projected
    gradient is ``channels_first_gradient @ projection_matrix(...)``.
    """
    key = stream_key(seed, name, "projection")
    if kind == "gaussian":
        return gaussian(key, refresh, columns, rank) / math.sqrt(rank)
    return unpack_signs(sign_words(key, refresh, columns, rank), rank) / math.sqrt(rank)
