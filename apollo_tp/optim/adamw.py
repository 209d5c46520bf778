"""AdamW for what is not projected: norms, biases, small matrices, and whatever the configuration leaves to it."""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig
from apollo_tp.optim.weight import Weight


class AdamWState:
    """Moments of one parameter, LOCAL, fp32, sharded exactly as its weight, or those of ``shared``. No collective."""

    def __init__(self, weight: Weight, shared: AdamWState | None = None) -> None:
        self.index, self.weight = weight.index, weight
        if shared is not None:
            self.exp_avg, self.exp_avg_sq = shared.exp_avg, shared.exp_avg_sq
            return
        self.exp_avg = torch.zeros(weight.local_2d, device=weight.data.device)
        self.exp_avg_sq = torch.zeros(weight.local_2d, device=weight.data.device)

    def candidate(self, gradient: Tensor, step: int, config: OptimConfig) -> tuple[Tensor, Tensor, Tensor]:
        """(exp_avg, exp_avg_sq, update at learning rate 1) after one more fp32 ``gradient``; the state stays as it is.

        As torch.optim.AdamW: eps is added to the bias-corrected root.
        """
        beta1, beta2 = config.betas
        m = self.exp_avg * beta1 + gradient * (1 - beta1)
        v = self.exp_avg_sq * beta2 + gradient.square() * (1 - beta2)
        corrected = (v / (1 - beta2 ** (step + 1))).sqrt_().add_(config.eps)
        return m, v, m / (1 - beta1 ** (step + 1)) / corrected
