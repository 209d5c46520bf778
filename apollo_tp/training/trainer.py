"""One rank's trainer: takes samples, makes an optimizer step on the served weights, returns figures. No sockets, no Hydra.

``step``, ``preference_step`` and ``score`` are collective: every rank calls them with the same arguments in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from apollo_tp.config import GradientMode
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError
from apollo_tp.gpu_sharing.pace import Pace
from apollo_tp.model import BoundModel
from apollo_tp.model.batch import PackedBatch, empty_share, pack, pack_pairs
from apollo_tp.model.loss import preference_loss, unit
from apollo_tp.optim import Optimizer
from apollo_tp.training.cuda_graphs import GraphCache
from apollo_tp.wire.commands import PreferencePair, Sample, StepFigures


@dataclass(frozen=True)
class ScoreResult:
    """Per sample, in the order given, the same on every rank: weighted log-probability in nats, sum of weights, and the
    number of tokens with a weight that are the arg max of the model's prediction."""

    logprobs: list[float]
    weights: list[float]
    num_correct: list[float]


class Trainer:
    """Steps a bound model. ``weight_version`` counts completed updates over the life of the server.

    ``before_write`` is called on every rank before the first weight is written: between the backward pass and the
    update, or before the backward pass of a step that updates in it. ``pace`` gives inference its share of the GPU's
    time. With a ``mesh`` of several replicas, each takes a part of a step's samples, and figures are of all. Raises
    ConfigError if ``gradients`` is GradientMode.in_backward, and the optimizer clips or there are several replicas.
    """

    def __init__(
        self,
        model: BoundModel,
        optimizer: Optimizer,
        tp: TPGroup,
        *,
        mesh: Mesh | None = None,
        device: torch.device,
        max_micro_batch_tokens: int,
        gradients: GradientMode = GradientMode.auto,
        weight_version: int = 0,
        before_write: Callable[[], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.tp = tp
        self.mesh = mesh or Mesh.single(tp)
        self.replicas = self.mesh.replicas
        self.device = device
        self.max_micro_batch_tokens = max_micro_batch_tokens
        self.weight_version = weight_version
        self._before_write = before_write or (lambda: None)
        self._pace = pace or Pace(1.0, model.module, tp, device)
        if gradients is GradientMode.auto and (optimizer.config.max_grad_norm is not None or self.replicas.size > 1):
            gradients = GradientMode.stored  # clipping needs the norm of the whole gradient, replicas need their sum
        if gradients is not GradientMode.stored:
            optimizer.attach_in_backward()
        self.gradients = gradients
        self._replays: GraphCache | None = None
        self._has_compared = False
        self._progress = optimizer.progress()

    def record_passes(self, replays: GraphCache) -> bool:
        """From now on, replay consecutive steps of one batch structure. Returns False, and changes nothing, if that is never
        possible: where gradients are not stored, where the trainer pauses between layers for inference, or where the
        model's work depends on more than a batch's structure."""
        possible = self.gradients is GradientMode.stored and self.model.is_static and not self._pace.rests
        self._replays = replays if possible else None
        return possible

    def step(self, samples: Sequence[Sample], learning_rate_scale: float = 1.0) -> StepFigures:
        """One supervised step: weighted mean cross-entropy over all samples, accumulated over micro-batches.

        ``learning_rate_scale`` multiplies the scheduled learning rate. Raises RequestError for samples that cannot be
        packed, ReplicaError if ranks turn out to differ, and whatever the model or a collective raises; see
        ``abandon_step``.
        """
        clock = _Clock(self.device)
        batches = pack(samples, self.max_micro_batch_tokens, self.replicas.rank, self.replicas.size)
        share = 1.0 / math.fsum(weight for sample in samples for weight in sample.weights)
        batches = [batch.scaled(share) for batch in batches]

        def loss_of(batch: PackedBatch) -> tuple[Tensor, Tensor]:
            sums = self.model.forward_loss(batch)
            return sums.loss, sums.correct

        return self._step(batches, loss_of, learning_rate_scale, clock, self._replays)

    def preference_step(
        self, pairs: Sequence[PreferencePair], beta: float, learning_rate_scale: float = 1.0
    ) -> StepFigures:
        """One DPO step (Rafailov et al. 2023, eq. 7): mean over pairs. Both sides of a pair share a micro-batch.
        Arguments and errors as of ``step``; ``beta`` is the inverse temperature of the loss."""
        clock = _Clock(self.device)
        batches = pack_pairs(pairs, self.max_micro_batch_tokens, self.replicas.rank, self.replicas.size)
        reference = torch.tensor([(p.reference_preferred, p.reference_rejected) for p in pairs], device=self.device)
        margins: list[Tensor] = []

        def loss_of(batch: PackedBatch) -> tuple[Tensor, Tensor]:
            scored = self.model.sequence_logprobs(batch)
            members = [index // 2 for index in batch.sample_index[::2]]
            policy = scored.sequences.view(-1, 2)
            losses, margin = preference_loss(policy, reference[members], beta)
            margins.append(margin.detach())
            return losses.sum() / len(pairs), scored.correct.sum()

        figures = self._step(batches, loss_of, learning_rate_scale, clock)
        margin = torch.cat([*margins, torch.empty(0, device=self.device)]).double()
        sums = self.replicas.all_reduce_(torch.stack([margin.sum(), (margin > 0).double().sum()])) / len(pairs)
        rewards = dict(zip(("reward_margin", "reward_accuracy"), sums.tolist(), strict=True))
        return msgspec.structs.replace(figures, metrics=rewards)

    def _step(
        self,
        batches: Sequence[PackedBatch],
        loss_of: Callable[[PackedBatch], tuple[Tensor, Tensor]],
        learning_rate_scale: float,
        clock: _Clock,
        replays: GraphCache | None = None,
    ) -> StepFigures:
        in_backward = self._updates_in_backward(batches)
        # before any pass: a copy waits for work launched before it
        batches = [batch.to(self.device) for batch in batches]
        if replays is None or not batches or not replays.can_replay(batches):
            self._make_room()
            replays = None
        self._pace.begin()
        writes_already = self._catch_up()
        self._progress = self.optimizer.progress()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for position, batch in enumerate(batches):
            if replays is not None:
                loss, hits = replays.run(batch, accumulate=position > 0, between=lambda: clock.mark("forward"))
            else:
                loss, hits = loss_of(batch)
                self._pace.give_way()
                clock.mark("forward")
                if position == len(batches) - 1:
                    self.optimizer.begin_exchange()
                self._backward(loss, learning_rate_scale if in_backward else None)
            clock.mark("backward")
            loss_sum += loss.detach()
            correct += hits.detach()
        compare = self._compares_gradients()
        received = self.model.finish_gradients(compare=compare)
        self._has_compared |= compare  # if it did not raise
        clock.mark("backward")
        if not in_backward and not writes_already:
            self._before_write()
        outcome = self.optimizer.step(learning_rate_scale, loss_sum, received)
        if not outcome.skipped or outcome.num_updated:  # an update in the backward pass may stop after some matrices
            self.weight_version += 1
        self._progress = self.optimizer.progress()
        self.model.zero_grad()
        self._pace.give_way()
        clock.mark("optimizer")
        loss, num_correct, num_tokens, num_loss_tokens, num_batches = self._over_replicas(loss_sum, correct, batches)
        return StepFigures(
            loss=loss,
            num_tokens=num_tokens,
            num_loss_tokens=num_loss_tokens,
            padding_share=empty_share(num_tokens, num_batches, self.max_micro_batch_tokens),
            num_micro_batches=num_batches,
            gradients="in_backward" if in_backward else "stored",
            token_accuracy=num_correct / max(num_loss_tokens, 1),
            grad_norm=outcome.grad_norm,
            learning_rate=outcome.learning_rate,
            largest_update=outcome.largest_update,
            num_updated=outcome.num_updated,
            skipped=outcome.skipped,
            weight_version=self.weight_version,
            step_seconds=clock.total(),
            forward_seconds=clock.seconds["forward"],
            backward_seconds=clock.seconds["backward"],
            optimizer_seconds=clock.seconds["optimizer"],
            paused_seconds=0.0,  # known once all ranks have ended the command, as is what follows
            peak_memory_bytes=[],
            metrics={},
        )

    def _over_replicas(
        self, loss: Tensor, correct: Tensor, batches: Sequence[PackedBatch]
    ) -> tuple[float, float, int, int, int]:
        """Loss, correct tokens, tokens, tokens with a weight, and micro-batches of all replicas. Waits for the device.

        Collective over replicas, if there are several: one all-reduce of fp64 [5].
        """
        counts = [sum(b.num_tokens for b in batches), sum(b.num_loss_tokens for b in batches), len(batches)]
        sums = torch.stack(
            [loss.double(), correct.double(), *torch.tensor(counts, dtype=torch.float64, device=self.device)]
        )
        total, hits, *counts = self.replicas.all_reduce_(sums).tolist()
        return total, hits, *(int(count) for count in counts)  # type: ignore[return-value]

    def _catch_up(self) -> bool:
        """After a command that failed, copy the owners' weights into the memory of replicas that may lack some, before these
        compute with theirs. Returns whether this wrote, so that the server is paused already. Collective, as
        ``Optimizer.catch_up``."""
        if not self.optimizer.is_behind:
            return False
        self._before_write()
        self.optimizer.catch_up()
        return True

    def _backward(self, loss: Tensor, learning_rate_scale: float | None) -> None:
        """The backward pass of a micro-batch. If a scale is given, weights are updated within it."""
        if learning_rate_scale is not None:
            self._before_write()
            self.optimizer.begin_step_in_backward(learning_rate_scale, loss)
        loss.backward(unit(loss.device))
        self._pace.give_way()

    def _compares_gradients(self) -> bool:
        """Whether this step compares the gradients that should be identical on several ranks: the first step does, and each
        one that ends with a check of the replicas."""
        every, count = self.optimizer.config.check_replicas_every, self.optimizer.step_count + 1
        return every > 0 and (not self._has_compared or count % every == 0)

    def abandon_step(self) -> None:
        """After a step that raised on this rank: forget it, and count it if it has written already. It may have if it
        updates in the backward pass, or found replicas to differ. Local."""
        self.optimizer.zero_grad()  # which counts what was written in the backward pass
        if self.optimizer.progress() != self._progress:
            self.weight_version += 1
        self._progress = self.optimizer.progress()
        self.model.zero_grad()

    def rejoin(self) -> None:
        """After a command that raised on some rank: forget what may not be the same on all ranks. Call it on all of them."""
        self._has_compared = False
        self.optimizer.rejoin()
        self.model.zero_grad()

    def _updates_in_backward(self, batches: Sequence[PackedBatch]) -> bool:
        """Whether this step updates in its backward pass. Raises ConfigError if it must and cannot; nothing is written
        then."""
        if self.gradients is GradientMode.in_backward and len(batches) != 1:
            tokens = sum(batch.num_tokens for batch in batches)
            raise ConfigError(
                f"train.gradients=in_backward: got a step of {tokens} tokens in {len(batches)} micro-batches, expected one "
                f"micro-batch of at most train.max_micro_batch_tokens ({self.max_micro_batch_tokens}), since gradients that "
                "are freed in the backward pass cannot be accumulated; send fewer samples a step, raise "
                "train.max_micro_batch_tokens, or set train.gradients=auto"
            )
        return self.gradients is not GradientMode.stored and len(batches) == 1

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> ScoreResult:
        """Log-probabilities of ``samples`` under the current weights; nothing changes. Raises RequestError for samples that
        cannot be packed."""
        logprobs, correct = [0.0] * len(samples), [0.0] * len(samples)
        self._catch_up()
        self._pace.begin()
        self._make_room()
        for batch in pack(samples, self.max_micro_batch_tokens):
            scored = self.model.sequence_logprobs(batch.to(self.device))
            self._pace.give_way()
            for index, logprob, hits in zip(
                batch.sample_index, scored.sequences.tolist(), scored.correct.tolist(), strict=True
            ):
                logprobs[index], correct[index] = logprob, hits
        return ScoreResult(logprobs, [sum(s.weights) for s in samples], correct)

    def peak_memory_bytes(self) -> int:
        """Peak GPU memory of this rank beyond the served weights since its memory was planned; 0 on CPU."""
        if self.device.type != "cuda":
            return 0
        peak = self._replays.peak_memory_bytes() if self._replays else torch.cuda.max_memory_allocated(self.device)
        return peak + self.tp.peers.allocated_bytes()

    def _make_room(self) -> None:
        if self._replays is not None:
            self._replays.release()


class _Clock:
    """Time per phase of a step: on CUDA measured by the device, since the host is phases ahead, elsewhere by the host.
    A phase ends at its mark and begins at the mark before it; the first one begins when the clock is made."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self._device, self._start = device, time.perf_counter()
        self._last = self._now()
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def mark(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def total(self) -> float:
        """Wait for the device; returns the host's seconds since the clock was made, and fills ``seconds``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total = time.perf_counter() - self._start
        for phase, now in self._marks:
            self.seconds[phase] += _elapsed(self._last, now)
            self._last = now
        self._marks = []
        return total

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        assert isinstance(stop, float)
        return stop - start
    return start.elapsed_time(stop) / 1e3  # type: ignore[no-any-return]
