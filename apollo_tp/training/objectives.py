"""What a step minimises: its micro-batches, the loss of each of them, and what the losses say about the step.

All ranks make the same objective. Samples are divided over the replicas of the mesh; figures are of all of them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ApolloTpError
from apollo_tp.model import BoundModel
from apollo_tp.model import policy_loss as policy
from apollo_tp.model.batch import PackedBatch, pack, pack_pairs
from apollo_tp.model.loss import preference_loss
from apollo_tp.wire.commands import PreferencePair, Sample
from apollo_tp.wire.losses import Loss, LossConfig


class NothingToLearnError(ApolloTpError):
    """No sample of a step can be learned from: all ranks raise it alike, before anything is written."""


@dataclass(frozen=True)
class Place:
    """Where an objective is computed: the bound model, the other replicas, the device, and how much is packed together."""

    model: BoundModel
    replicas: TPGroup
    device: torch.device
    max_tokens: int


class Objective:
    """``batches`` are the micro-batches of this replica, on the CPU. ``replayable``: their passes are ``forward_loss`` and
    depend only on their structure."""

    replayable = False

    def __init__(self, place: Place, batches: list[PackedBatch]) -> None:
        self.place, self.batches = place, batches

    def begin(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """Called once with the micro-batches on the device and current weights; returns those to learn from. May be
        collective."""
        return batches

    def loss(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the step's loss (0-d, differentiable), and its number of arg-max hits (fp32, 0-d)."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Further figures of the step by name. Collective over replicas, if there are several."""
        return {}


def objective_of(place: Place, samples: Sequence[Sample], loss: Loss) -> Objective:
    """The objective of ``loss`` over ``samples``, the global batch. Raises RequestError for samples that cannot be packed,
    and NothingToLearnError."""
    if loss.name == "cross_entropy":
        return CrossEntropy(place, samples, loss.config)
    return Policy(place, samples, loss)


def shares(sums: Sequence[float], config: LossConfig) -> list[float]:
    """The factor of each sample's weights that makes the weighted sum of a step's token losses the mean that ``config`` asks
    for. ``sums`` are the sums of the samples' weights, of all replicas. Raises NothingToLearnError if all are 0, but where
    weights may have either sign and are divided by a constant."""
    if config.normalisation == "constant" and sums:
        assert config.divisor is not None
        return [1.0 / config.divisor] * len(sums)
    if not any(sums):
        raise NothingToLearnError(f"none of {len(sums)} samples has a token to learn from")
    if config.normalisation == "sequence_mean":
        count = sum(1 for total in sums if total)
        return [1.0 / (total * count) if total else 0.0 for total in sums]
    return [1.0 / math.fsum(sums)] * len(sums)


def _shared(batch: PackedBatch, factors: Sequence[float]) -> PackedBatch:
    """The batch with its weights times its samples' ``factors``."""
    own = torch.tensor([factors[index] for index in batch.sample_index], device=batch.weights.device)
    return batch.with_weights(batch.weights * own[batch.sequence_of_token()])


class CrossEntropy(Objective):
    """Weighted negative log-likelihood."""

    replayable = True

    def __init__(self, place: Place, samples: Sequence[Sample], config: LossConfig) -> None:
        batches = pack(samples, place.max_tokens, place.replicas.rank, place.replicas.size)
        factors = shares([math.fsum(sample.weights) for sample in samples], config)
        super().__init__(place, [_shared(batch, factors) for batch in batches])

    def loss(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        sums = self.place.model.forward_loss(batch)
        return sums.loss, sums.correct


class Preference(Objective):
    """DPO (Rafailov et al. 2023, eq. 7): the mean over pairs. Both sides of a pair share a micro-batch."""

    def __init__(self, place: Place, pairs: Sequence[PreferencePair], beta: float) -> None:
        super().__init__(place, pack_pairs(pairs, place.max_tokens, place.replicas.rank, place.replicas.size))
        self._num_pairs, self._beta = len(pairs), beta
        reference = [(pair.reference_preferred, pair.reference_rejected) for pair in pairs]
        self._reference = torch.tensor(reference, device=place.device)
        self._margins: list[Tensor] = []

    def loss(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        scored = self.place.model.sequence_logprobs(batch)
        members = [index // 2 for index in batch.sample_index[::2]]
        losses, margin = preference_loss(scored.sequences.view(-1, 2), self._reference[members], self._beta)
        self._margins.append(margin.detach())
        return losses.sum() / self._num_pairs, scored.correct.sum()

    def metrics(self) -> dict[str, float]:
        margin = torch.cat([*self._margins, torch.empty(0, device=self.place.device)]).double()
        sums = torch.stack([margin.sum(), (margin > 0).double().sum()])
        means = self.place.replicas.all_reduce_(sums) / self._num_pairs
        return dict(zip(("reward_margin", "reward_accuracy"), means.tolist(), strict=True))


class Policy(Objective):
    """A loss of ``policy_loss`` over sampled tokens.

    Where tokens may be masked by their ratio, or a loss needs a figure of all samples, a first pass without gradients looks
    at all micro-batches under the weights of the step's begin: what it masks leaves all denominators.
    """

    def __init__(self, place: Place, samples: Sequence[Sample], loss: Loss) -> None:
        super().__init__(place, pack(samples, place.max_tokens, place.replicas.rank, place.replicas.size))
        self._samples, self._loss = samples, loss
        config = loss.config
        self._looks_first = loss.name == "kto" or config.mask_low is not None or config.mask_high is not None
        self._streams: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._baseline = torch.zeros((), device=place.device)
        self._figures = _Figures(samples, loss)

    def begin(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """With a first pass: one all-reduce of fp64 [samples + 1] over replicas."""
        self._streams = {batch.sample_index: self._streams_of(batch) for batch in batches}
        sums = [math.fsum(sample.weights) for sample in self._samples]
        if self._looks_first:
            batches, sums = self._first_pass(batches)
        factors = shares(sums, self._loss.config)
        return [_shared(batch, factors) for batch in batches]

    def loss(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        tokens, correct, entropy = self._tokens(batch)
        if not self._looks_first:
            self._figures.add(tokens, entropy)
        weights = batch.weights[batch.loss_positions]
        # where, since a masked token's loss may not be finite
        losses = torch.where(tokens.learned, policy.token_losses(tokens, self._loss), 0.0)
        return (weights * losses).sum(), (correct & tokens.learned).float().sum()

    def metrics(self) -> dict[str, float]:
        return self._figures.over(self.place.replicas, self.place.device)

    @torch.no_grad()
    def _first_pass(self, batches: list[PackedBatch]) -> tuple[list[PackedBatch], list[float]]:
        """The batches without the weights of masked tokens, and the sums of each sample's weights over all replicas."""
        sums = torch.zeros(len(self._samples) + 1, dtype=torch.float64, device=self.place.device)
        result = []
        for batch in batches:
            tokens, _, entropy = self._tokens(batch)
            kept = policy.within_mask(tokens, self._loss.config)
            self._figures.add(tokens, entropy, kept)
            sums[-1] += policy.sequence_logratios(tokens).double().sum()
            weights, at = batch.weights.clone(), batch.loss_positions
            weights[at] = torch.where(kept, weights[at], 0.0)
            index = torch.tensor(batch.sample_index, device=weights.device)
            sums.index_add_(0, index[batch.sequence_of_token()], weights.double())
            result.append(batch.with_weights(weights))
        *counted, logratio = self.place.replicas.all_reduce_(sums).tolist()
        self._baseline.fill_(max(0.0, logratio / len(self._samples)))
        return result, counted

    def _tokens(self, batch: PackedBatch) -> tuple[policy.Tokens, Tensor, Tensor]:
        """The loss tokens, whether each is the arg max, and their entropy."""
        streams, at = self._streams[batch.sample_index], batch.loss_positions
        members = [self._samples[index] for index in batch.sample_index]
        found = self.place.model.token_logprobs(batch, inverse_temperatures(members, self.place.device))
        tokens = policy.Tokens(
            new=found.logprobs,
            old=streams["sampling_logprobs"][at],
            advantages=streams["advantages"][at],
            reference=streams["reference_logprobs"][at],
            teacher=streams["teacher_logprobs"][at],
            sequence=batch.sequence_of_token()[at],
            learned=batch.weights[at] != 0,
            num_sequences=len(batch.lengths),
            baseline=self._baseline,
        )
        return tokens, found.correct, found.entropy

    def _streams_of(self, batch: PackedBatch) -> dict[str, Tensor]:
        """What is known of the sampled tokens, at the positions that predict them: fp32 [T] each."""
        names = ("sampling_logprobs", "advantages", "reference_logprobs", "teacher_logprobs")
        members = [self._samples[index] for index in batch.sample_index]
        streams = {name: _stream(members, [getattr(sample.sampled, name) for sample in members]) for name in names}
        return {name: stream.to(self.place.device, non_blocking=True) for name, stream in streams.items()}


def inverse_temperatures(samples: Sequence[Sample], device: torch.device) -> Tensor | None:
    """For each token of ``samples``, packed in this order: fp32 [T]; None if all are 1."""
    temperatures = torch.tensor([sample.sampled.temperature for sample in samples])
    if (temperatures == 1).all():
        return None
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    return temperatures.reciprocal().repeat_interleave(lengths).to(device)


def _stream(samples: Sequence[Sample], values: Sequence[Sequence[float]]) -> Tensor:
    """The values of each sample's last tokens, 0 before them, at the positions that predict the tokens: fp32 [T]."""
    flat = array("d")
    for sample, own in zip(samples, values, strict=True):
        flat.extend([0.0] * (len(sample.token_ids) - len(own)))
        flat.extend(own)
    return torch.frombuffer(flat, dtype=torch.float64).float().roll(-1)


class _Figures:
    """Sums and extremes over the loss tokens of a step, as its first pass over each micro-batch found them."""

    SUMS = ("tokens", "masked_share", "entropy", "mismatch_kl", "ratio_mean", "clip_fraction", "reference_kl")
    EXTREMES = ("mismatch_kl_max", "ratio_max", "ratio_min")

    def __init__(self, samples: Sequence[Sample], loss: Loss) -> None:
        self._loss, sampled = loss, [sample.sampled for sample in samples]
        self._has_old = all(each.sampling_logprobs for each in sampled)
        self._has_reference = all(each.reference_logprobs for each in sampled)
        self._of_samples = {
            "reward_mean": _mean([each.reward for each in sampled if each.reward is not None]),
            "advantage_mean": _mean([_mean(each.advantages) or 0.0 for each in sampled if each.advantages]),
        }
        self._sums: list[Tensor] = []
        self._extremes: list[Tensor] = []

    @torch.no_grad()
    def add(self, tokens: policy.Tokens, entropy: Tensor, kept: Tensor | None = None) -> None:
        """Count a micro-batch. ``kept`` bool [N]: tokens that are not masked by their ratio."""
        if not len(entropy):
            return
        logs = (tokens.new - tokens.old).double().clamp(-policy.MAX_LOG_RATIO, policy.MAX_LOG_RATIO)
        ratio, mismatch = logs.exp(), logs.exp() - logs - 1
        masked = torch.zeros_like(tokens.learned) if kept is None else ~kept
        clipped = policy.clipped(tokens, self._loss) & ~masked
        divergence = policy.divergence(tokens, self._loss.config)
        columns = [torch.ones_like(ratio), masked, entropy, mismatch, ratio, clipped, divergence]
        self._sums.append(torch.stack([column.double().sum() for column in columns]))
        self._extremes.append(torch.stack([mismatch.max(), ratio.max(), -ratio.min()]))

    def over(self, replicas: TPGroup, device: torch.device) -> dict[str, float]:
        """The figures of all replicas. Collective over them: a sum of fp64 [7] and a maximum of fp64 [3]."""
        zeros = torch.zeros(len(self.SUMS), dtype=torch.float64, device=device)
        lowest = torch.full((len(self.EXTREMES),), -torch.inf, dtype=torch.float64, device=device)
        sums = replicas.all_reduce_(torch.stack([zeros, *self._sums]).sum(0)).tolist()
        extremes = replicas.all_reduce_(torch.stack([lowest, *self._extremes]).amax(0), dist.ReduceOp.MAX).tolist()
        figures = {name: total / max(sums[0], 1.0) for name, total in zip(self.SUMS[1:], sums[1:], strict=True)}
        # 1 - clip_fraction of what is not masked
        figures["clip_fraction"] /= max(1.0 - figures["masked_share"], 1e-12)
        figures |= dict(zip(self.EXTREMES, extremes, strict=True))
        figures["ratio_min"] *= -1
        if not self._has_old:
            for name in ("mismatch_kl", "mismatch_kl_max", "ratio_mean", "ratio_min", "ratio_max", "clip_fraction"):
                del figures[name]
        if not self._has_reference:
            del figures["reference_kl"]
        return figures | {name: value for name, value in self._of_samples.items() if value is not None}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
