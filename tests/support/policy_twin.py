"""Plain twins of the losses over sampled tokens: one process, one sequence after the other, over all logits in fp32.

Written from the formulas (Schulman et al. 2017; MiniMax 2025; Zheng et al. 2025; Ethayarajh et al. 2024; Schulman's
estimates of the KL divergence), not from ``model/policy_loss.py``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel

from apollo_tp.inspect.exactness import samples
from apollo_tp.wire.commands import Sample, Sampled
from apollo_tp.wire.losses import Loss, LossConfig, LossName, complete


def loss_of(name: LossName, **config: object) -> Loss:
    return complete(name, LossConfig(**config))  # type: ignore[arg-type]


CASES: dict[str, Loss] = {
    "importance sampling": loss_of("importance_sampling"),
    "capped": loss_of("importance_sampling", is_cap=1.1, kl_coef=0.2, kl_estimator="k1"),
    "masked tokens": loss_of("importance_sampling", mask_low=0.8, mask_high=1.25),
    "capped sequences": loss_of("importance_sampling", is_mode="sequence", is_cap=1.5, normalisation="sequence_mean"),
    "masked sequences": loss_of(
        "importance_sampling", is_mode="sequence", mask_low=0.5, mask_high=2.0, normalisation="sequence_mean"
    ),
    "ppo": loss_of("ppo", clip_low=0.1, clip_high=0.2, kl_coef=0.1, kl_estimator="k2"),
    "ppo, masked": loss_of("ppo", mask_low=0.7, normalisation="constant", divisor=64.0),
    "cispo": loss_of("cispo", clip_low=0.3, clip_high=0.2, kl_coef=0.1),
    "gspo": loss_of("gspo", clip_low=0.02, clip_high=0.02),
    "gspo, masked": loss_of("gspo", mask_high=1.2, normalisation="token_mean"),
    "kto": loss_of("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    "distill": loss_of("distill", is_cap=1.2, mask_low=0.8),
    "cross-entropy of sequences": loss_of("cross_entropy", normalisation="sequence_mean"),
}


@dataclass
class Sequence:
    """The loss tokens of a sample: log-probabilities (nats) at its temperature, and their weights."""

    new: Tensor
    entropy: Tensor
    weights: Tensor
    old: Tensor
    advantages: Tensor
    reference: Tensor
    teacher: Tensor


def sequences(model: PreTrainedModel, batch: list[Sample], is_plain: bool) -> list[Sequence]:
    """``is_plain``: without temperatures, which cross-entropy does not have."""
    result = []
    for sample in batch:
        ids = torch.tensor(sample.token_ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        logits = logits if is_plain else logits / sample.sampled.temperature
        logprobs = logits.log_softmax(-1)
        learned = [i for i, weight in enumerate(sample.weights) if weight]
        first = len(ids) - len(sample.sampled.sampling_logprobs)

        def pick(values: list[float], learned: list[int] = learned, first: int = first) -> Tensor:
            return torch.tensor([values[i - first] for i in learned])

        at = torch.tensor(learned) - 1
        known = sample.sampled
        result.append(
            Sequence(
                logprobs[at, ids[learned]], -(logprobs[at].exp() * logprobs[at]).sum(-1),
                torch.tensor([sample.weights[i] for i in learned]), pick(known.sampling_logprobs),
                pick(known.advantages), pick(known.reference_logprobs), pick(known.teacher_logprobs),
            )
        )  # fmt: skip
    return result


def sampled_batch(model: PreTrainedModel) -> list[Sample]:
    """Random sequences at three temperatures, whose sampling log-probabilities are near those of ``model``."""
    draw, result = random.Random(3), []
    for number, sample in enumerate(samples()):
        temperature = (1.0, 0.7, 1.3)[number % 3]
        ids = torch.tensor(sample.token_ids)
        with torch.no_grad():
            logprobs = (model(input_ids=ids[None]).logits[0, :-1].float() / temperature).log_softmax(-1)
        count = len(ids) - max(1, len(ids) // 4)
        new = logprobs.gather(1, ids[1:, None])[-count:, 0].tolist()
        near = [[value + draw.gauss(0, 0.25) for value in new] for _ in range(3)]
        advantage = draw.gauss(0, 1)
        sampled = Sampled(
            sampling_logprobs=near[0], reference_logprobs=near[1], teacher_logprobs=near[2], temperature=temperature,
            advantages=[advantage + draw.gauss(0, 0.01) for _ in new], reward=advantage,
        )  # fmt: skip
        result.append(msgspec.structs.replace(sample, sampled=sampled))
    return result


def _token_losses(seq: Sequence, loss: Loss, kept: Tensor, drift: Tensor) -> Tensor:
    config, ratio, advantage = loss.config, (seq.new - seq.old).exp(), seq.advantages
    if loss.name == "cross_entropy":
        return -seq.new
    if loss.name == "kto":
        value = config.beta * ((seq.new - seq.reference)[kept].sum() - drift)
        if advantage[0] > 0:
            return (config.desirable_weight * (1 - torch.sigmoid(value))).expand(len(ratio))
        return (config.undesirable_weight * (1 - torch.sigmoid(-value))).expand(len(ratio))
    if loss.name in ("ppo", "gspo"):
        if loss.name == "gspo":
            ratio = ratio[kept].log().mean().exp().expand(len(ratio))
        low, high = 1 - config.clip_low, 1 + config.clip_high
        return -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    if loss.name == "cispo":
        return -ratio.detach().clamp(1 - config.clip_low, 1 + config.clip_high) * advantage * seq.new
    if loss.name == "distill":
        advantage = seq.teacher - seq.new.detach()
    if config.is_mode == "sequence":
        ratio = ratio.log().sum().exp().detach() * (1 + seq.new - seq.new.detach())
    cap = config.is_cap or torch.inf
    return -torch.where(ratio > cap, min(cap, 1e9) * (1 + seq.new - seq.new.detach()), ratio) * advantage


def _penalty(seq: Sequence, config: LossConfig) -> Tensor:
    if config.kl_estimator == "k1":
        return seq.new - seq.reference
    if config.kl_estimator == "k2":
        return 0.5 * (seq.new - seq.reference) ** 2
    return (seq.reference - seq.new).exp() - 1 - (seq.reference - seq.new)


def _kept(seq: Sequence, config: LossConfig) -> Tensor:
    ratio = (seq.new - seq.old).detach().exp()
    if config.is_mode == "sequence":
        ratio = ratio.prod().expand(len(ratio))
    return (ratio >= (config.mask_low or 0)) & (ratio <= (config.mask_high or torch.inf))


def loss_and_figures(model: PreTrainedModel, batch: list[Sample], loss: Loss) -> tuple[Tensor, dict[str, float]]:
    """The loss of the whole batch (0-d, differentiable), and the figures of the step."""
    config, parts = loss.config, sequences(model, batch, loss.name == "cross_entropy")
    kept = [_kept(seq, config) for seq in parts]
    drift = sum((seq.new - seq.reference).detach().sum() for seq in parts) / len(parts)
    drift = torch.as_tensor(drift).clamp(min=0)
    sums, weights = [], []
    for seq, keep in zip(parts, kept, strict=True):
        losses = _token_losses(seq, loss, keep, drift)
        if config.kl_coef:
            losses = losses + config.kl_coef * _penalty(seq, config)
        sums.append((losses * seq.weights)[keep].sum())
        weights.append(seq.weights[keep].sum())
    if config.normalisation == "token_mean":
        total = sum(sums) / sum(weights)
    elif config.normalisation == "sequence_mean":
        means = [part / weight for part, weight in zip(sums, weights, strict=True) if weight]
        total = sum(means) / len(means)
    else:
        total = sum(sums) / config.divisor
    every = torch.cat(kept)
    ratio = torch.cat([(seq.new - seq.old).detach().exp() for seq in parts])
    mismatch = ratio - 1 - ratio.log()
    figures = {
        "masked_share": float((~every).float().mean()), "entropy": torch.cat([s.entropy for s in parts]).mean().item(),
        "mismatch_kl": float(mismatch.mean()), "mismatch_kl_max": float(mismatch.max()),
        "ratio_mean": float(ratio.mean()), "ratio_min": float(ratio.min()), "ratio_max": float(ratio.max()),
    }  # fmt: skip
    return total, figures
