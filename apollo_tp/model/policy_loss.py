"""Losses over sampled tokens: each a function of per-token tensors, so that all share one path through the model.

Every function takes the ``Tokens`` of a micro-batch and the loss's options, and returns the loss of each token (fp32 [N],
differentiable). The caller multiplies by the tokens' weights, which contain the denominators, and sums. No collectives: all
inputs are the same on all ranks.

r is the ratio of a token's probability under the weights that are trained to that under the weights that sampled it, A its
advantage, and [x] a value that no gradient goes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_tp.wire.losses import Loss, LossConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here, so that one token that has become impossible does not make the whole step infinite."""


@dataclass(frozen=True)
class Tokens:
    """The N loss tokens of a micro-batch of S sequences; fp32 [N] and the same on all ranks, unless said otherwise.

    ``new`` are log-probabilities (nats, differentiable) under the weights that are trained; ``old``, ``reference`` and
    ``teacher`` under those that sampled them, of a reference and of a teacher, 0 if not known. ``sequence`` int64 [N] is the
    number of each token's sequence, ``learned`` bool [N] is False for tokens that are left out. ``baseline`` (0-d) is KTO's
    estimate of the divergence from the reference.
    """

    new: Tensor
    old: Tensor
    advantages: Tensor
    reference: Tensor
    teacher: Tensor
    sequence: Tensor
    learned: Tensor
    num_sequences: int
    baseline: Tensor

    def log_ratio(self) -> Tensor:
        """log r, differentiable."""
        return (self.new - self.old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def sequence_sums(self, values: Tensor) -> Tensor:
        """The sum of ``values`` [N] over the learned tokens of each sequence: [S]."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, torch.where(self.learned, values, 0.0))

    def ratio(self, config: LossConfig) -> Tensor:
        """r or, with is_mode "sequence", the product of r over the token's sequence. No gradient."""
        logs = self.log_ratio().detach()
        if config.is_mode == "sequence":
            logs = self.sequence_sums(logs)[self.sequence].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return logs.exp()


def token_losses(tokens: Tokens, loss: Loss) -> Tensor:
    """The loss of each token, with the penalty for its divergence from the reference."""
    result = _FUNCTIONS[loss.name](tokens, loss.config)
    if loss.config.kl_coef:
        result = result + loss.config.kl_coef * divergence(tokens, loss.config)
    return result


def divergence(tokens: Tokens, config: LossConfig) -> Tensor:
    """Schulman's estimate k1, k2 or k3 of the KL divergence of the trained weights from the reference, for each token."""
    logs = tokens.reference - tokens.new
    if config.kl_estimator == "k1":
        return -logs
    if config.kl_estimator == "k2":
        return logs.square() / 2
    return logs.exp() - logs - 1


def within_mask(tokens: Tokens, config: LossConfig) -> Tensor:
    """Whether each token's ratio is within [mask_low, mask_high]: bool [N]."""
    ratio = tokens.ratio(config)
    low, high = config.mask_low or 0.0, config.mask_high or torch.inf
    return (ratio >= low) & (ratio <= high)


def clipped(tokens: Tokens, loss: Loss) -> Tensor:
    """Whether a bound limits each token's loss or gradient: bool [N]."""
    config = loss.config
    if config.clip_low is None or config.clip_high is None:
        return tokens.ratio(config) > (config.is_cap or torch.inf)
    ratio = (_sequence_ratio(tokens) if loss.name == "gspo" else tokens.log_ratio().exp()).detach()
    below, above = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    if loss.name == "cispo":
        return below | above
    return (below & (tokens.advantages < 0)) | (above & (tokens.advantages > 0))


def sequence_logratios(tokens: Tokens) -> Tensor:
    """The log-ratio of each sequence to the reference (nats, summed over its learned tokens): [S]."""
    return tokens.sequence_sums(tokens.new - tokens.reference)


def _weighted(tokens: Tokens, config: LossConfig, advantages: Tensor) -> Tensor:
    """-min(r, cap) A, with the gradient -[min(r, cap)] A grad(new)."""
    ratio = tokens.ratio(config)
    if config.is_cap is not None:
        ratio = ratio.clamp(max=config.is_cap)
    return -ratio * advantages * (tokens.new - tokens.new.detach()).exp()


def _importance_sampling(tokens: Tokens, config: LossConfig) -> Tensor:
    return _weighted(tokens, config, tokens.advantages)


def _distill(tokens: Tokens, config: LossConfig) -> Tensor:
    """Reverse KL divergence from the teacher, estimated from sampled tokens: importance sampling with the advantage
    [teacher - new]."""
    return _weighted(tokens, config, (tokens.teacher - tokens.new).detach())


def _pessimistic(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """-min(r A, clip(r) A) (Schulman et al. 2017, eq. 7)."""
    assert config.clip_low is not None
    assert config.clip_high is not None
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def _ppo(tokens: Tokens, config: LossConfig) -> Tensor:
    return _pessimistic(tokens.log_ratio().exp(), tokens.advantages, config)


def _sequence_ratio(tokens: Tokens) -> Tensor:
    """The geometric mean of r over the learned tokens of the token's sequence; differentiable."""
    count = tokens.sequence_sums(torch.ones_like(tokens.new)).clamp(min=1.0)
    return (tokens.sequence_sums(tokens.log_ratio()) / count).exp()[tokens.sequence]


def _gspo(tokens: Tokens, config: LossConfig) -> Tensor:
    """Zheng et al. 2025, eq. 5."""
    return _pessimistic(_sequence_ratio(tokens), tokens.advantages, config)


def _cispo(tokens: Tokens, config: LossConfig) -> Tensor:
    """-[clip(r)] A new (MiniMax 2025, eq. 4)."""
    assert config.clip_low is not None
    assert config.clip_high is not None
    ratio = tokens.log_ratio().exp().clamp(1 - config.clip_low, 1 + config.clip_high).detach()
    return -ratio * tokens.advantages * tokens.new


def _kto(tokens: Tokens, config: LossConfig) -> Tensor:
    """Ethayarajh et al. 2024, eq. 7, of the token's sequence, which is desirable if its advantage is above 0."""
    assert config.beta is not None
    margin = config.beta * (sequence_logratios(tokens) - tokens.baseline)[tokens.sequence]
    desirable = tokens.advantages > 0
    value = torch.sigmoid(torch.where(desirable, margin, -margin))
    weight = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    return weight * (1 - value)


_FUNCTIONS: dict[str, Callable[[Tokens, LossConfig], Tensor]] = {
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "gspo": _gspo,
    "kto": _kto,
    "distill": _distill,
}
