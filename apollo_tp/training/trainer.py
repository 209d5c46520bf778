"""One rank's trainer: takes samples, makes an optimizer step on the served weights, returns figures. No sockets, no Hydra.

``step``, ``preference_step``, ``forward_backward``, ``optimizer_step`` and ``score`` are collective: every rank calls them
with the same arguments in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from apollo_tp.config import GradientMode
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.gpu_sharing.pace import Pace
from apollo_tp.model import BoundModel
from apollo_tp.model.batch import PackedBatch, empty_share, pack
from apollo_tp.model.loss import unit
from apollo_tp.optim import Optimizer
from apollo_tp.optim.late_weights import LateWeights
from apollo_tp.training.clock import Clock
from apollo_tp.training.cuda_graphs import GraphCache
from apollo_tp.training.objectives import (
    NothingToLearnError,
    Objective,
    Place,
    Preference,
    inverse_temperatures,
    objective_of,
)
from apollo_tp.training.results import PassFigures, ScoreResult, nothing_learned
from apollo_tp.training.step_options import StepOptions
from apollo_tp.wire.commands import PreferencePair, Sample, StepFigures
from apollo_tp.wire.losses import Loss

DEFAULT_LOSS = Loss()


@dataclass(frozen=True)
class _Passes:
    """Passes whose gradients the leaves hold, until they are written or dropped: sums as of ``LossSums``, this replica's
    micro-batches, and how many calls of ``forward_backward`` they were."""

    loss: Tensor
    correct: Tensor
    batches: list[PackedBatch]
    num_passes: int = 0


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
        self._place = Place(model, self.replicas, device, max_micro_batch_tokens)
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
        self._kept: _Passes | None = None

    def publish_late(self) -> None:
        """From now on, with several replicas, a step returns while the weights of other owners still arrive, beside the next
        forward pass. For updates during which the server is not paused. Launched trainers do not call it yet: its
        streams have not been tried on GPUs (tests/gpu/test_replicas.py)."""
        if self.optimizer.owners is not None:
            self.optimizer.late_weights = LateWeights(self.optimizer.owners, *self.model.reading_order())

    def record_passes(self, replays: GraphCache) -> bool:
        """From now on, replay consecutive steps of one batch structure. Returns False, and changes nothing, if that is never
        possible: where gradients are not stored, where the trainer pauses between layers for inference, or where the
        model's work depends on more than a batch's structure."""
        possible = self.gradients is GradientMode.stored and self.model.is_static and not self._pace.rests
        self._replays = replays if possible else None
        return possible

    def step(
        self,
        samples: Sequence[Sample],
        learning_rate_scale: float = 1.0,
        loss: Loss = DEFAULT_LOSS,
        max_staleness: int | None = None,
    ) -> StepFigures:
        """One step of ``loss`` over all samples, accumulated over micro-batches.

        ``learning_rate_scale`` multiplies the scheduled learning rate. Samples of weights that are more than
        ``max_staleness`` versions older than these are dropped; a step without any other writes nothing and says so. Raises
        RequestError for samples that cannot be packed, ReplicaError if ranks turn out to differ, and whatever the model or a
        collective raises; see ``abandon_step``.
        """
        clock = Clock(self.device)
        fresh = [sample for sample in samples if not self._is_stale(sample, max_staleness)]
        try:
            objective = objective_of(self._place, fresh, loss)
            figures = self._step(objective, learning_rate_scale, clock)
        except NothingToLearnError as error:
            why = f"{error}, {len(samples) - len(fresh)} stale ones not counted"
            figures = nothing_learned(why, self.weight_version, clock.total())
        if max_staleness is None:
            return figures
        stale = {"stale_samples": float(len(samples) - len(fresh))}
        return msgspec.structs.replace(figures, metrics=figures.metrics | stale)

    def preference_step(
        self, pairs: Sequence[PreferencePair], beta: float, learning_rate_scale: float = 1.0
    ) -> StepFigures:
        """One DPO step. Arguments and errors as of ``step``; ``beta`` is the inverse temperature of the loss."""
        clock = Clock(self.device)
        return self._step(Preference(self._place, pairs, beta), learning_rate_scale, clock)

    def _is_stale(self, sample: Sample, max_staleness: int | None) -> bool:
        version = sample.sampled.weight_version
        return max_staleness is not None and version is not None and self.weight_version - version > max_staleness

    def _step(self, objective: Objective, learning_rate_scale: float, clock: Clock) -> StepFigures:
        in_backward = self._updates_in_backward(objective.batches)
        # before any pass: a copy waits for work launched before it
        batches = [batch.to(self.device) for batch in objective.batches]
        replays = self._replays if objective.replayable else None
        if replays is None or not batches or not replays.can_replay(batches):
            self._make_room()
            replays = None
        self._pace.begin()
        writes_already = self._catch_up()
        self._progress = self.optimizer.progress()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        self._kept = None
        batches = objective.begin(batches)
        scale = learning_rate_scale if in_backward else None
        passes = self._run(objective, batches, clock, scale, replays)
        return self._update(passes, learning_rate_scale, clock, in_backward, writes_already, objective.metrics)

    def _run(
        self,
        objective: Objective,
        batches: Sequence[PackedBatch],
        clock: Clock,
        learning_rate_scale: float | None = None,
        replays: GraphCache | None = None,
        keeps: bool = False,
    ) -> _Passes:
        """Forward and backward pass of all micro-batches; if a scale is given, weights are updated in the backward pass.
        ``keeps``: others may follow before the update."""
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for position, batch in enumerate(batches):
            if replays is not None:
                loss, hits = replays.run(batch, accumulate=position > 0, between=lambda: clock.mark("forward"))
            else:
                loss, hits = objective.loss(batch)
                self._pace.give_way()
                clock.mark("forward")
                if position == len(batches) - 1 and not keeps:
                    self.optimizer.begin_exchange()
                self._backward(loss, learning_rate_scale)
            clock.mark("backward")
            loss_sum += loss.detach()
            correct += hits.detach()
        return _Passes(loss_sum, correct, list(batches))

    def _update(
        self,
        passes: _Passes,
        learning_rate_scale: float,
        clock: Clock,
        in_backward: bool = False,
        writes_already: bool = False,
        metrics: Callable[[], dict[str, float]] = dict,
    ) -> StepFigures:
        """Update the weights from the gradients of ``passes``."""
        loss_sum, correct, batches = passes.loss, passes.correct, passes.batches
        compare = self._compares_gradients()
        received = self.model.finish_gradients(compare=compare)
        self._has_compared |= compare  # if it did not raise
        clock.mark("backward")
        if not in_backward and not writes_already:
            self._before_write()
        outcome = self.optimizer.step(learning_rate_scale, loss_sum, received)
        sums = self._over_replicas(loss_sum, correct, batches)
        self.optimizer.launch_late()
        if not outcome.skipped or outcome.num_updated:  # an update in the backward pass may stop after some matrices
            self.weight_version += 1
        self._progress = self.optimizer.progress()
        self.model.zero_grad()
        self._pace.give_way()
        clock.mark("optimizer")
        loss, num_correct, num_tokens, num_loss_tokens, num_batches = _read(sums)
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
            metrics=metrics(),
        )

    def forward_backward(self, samples: Sequence[Sample], loss: Loss) -> PassFigures:
        """Add the gradients of ``loss`` over ``samples`` to those that are kept for ``optimizer_step``: any number of calls,
        and of scores between them; a step drops them. Nothing is written. Raises as ``step``, and ConfigError where
        gradients are never stored."""
        clock = Clock(self.device)
        if self.gradients is GradientMode.in_backward:
            raise ConfigError(
                "train.gradients: got in_backward, expected stored or auto, since gradients are kept between commands"
            )
        self._make_room()
        self._pace.begin()
        self._catch_up()
        kept = self._kept or _Passes(torch.zeros((), device=self.device), torch.zeros((), device=self.device), [])
        if not self._kept:
            self.optimizer.zero_grad()
            self.model.zero_grad()
        metrics: dict[str, float] = {}
        passes = _Passes(torch.zeros_like(kept.loss), torch.zeros_like(kept.correct), [])
        with contextlib.suppress(NothingToLearnError):
            objective = objective_of(self._place, samples, loss)
            batches = objective.begin([batch.to(self.device) for batch in objective.batches])
            passes = self._run(objective, batches, clock, keeps=True)
            metrics = objective.metrics()
        figures = _read(self._over_replicas(passes.loss, passes.correct, passes.batches))
        num_passes = kept.num_passes + 1
        self._kept = _Passes(
            kept.loss + passes.loss, kept.correct + passes.correct, kept.batches + passes.batches, num_passes
        )
        total, _, num_tokens, num_loss_tokens, _ = figures
        return PassFigures(total, num_tokens, num_loss_tokens, num_passes, clock.total(), metrics)

    def optimizer_step(self, num_passes: int, options: StepOptions) -> StepFigures:
        """Update the weights from the sum of all gradients since the last step, which must be those of ``num_passes`` calls
        of ``forward_backward``. Raises RequestError if they are not, and as ``step``."""
        clock, kept, self._kept = Clock(self.device), self._kept, None
        if kept is None or kept.num_passes != num_passes:
            raise RequestError(
                f"num_passes: got gradients of {kept.num_passes if kept else 0} passes, expected {num_passes}; after a "
                "failure or another step they are gone: send the passes again",
                field="num_passes",
            )
        self._progress = self.optimizer.progress()
        with options.applied_to(self.optimizer.config):
            return self._update(kept, 1.0, clock)

    def _over_replicas(self, loss: Tensor, correct: Tensor, batches: Sequence[PackedBatch]) -> Tensor:
        """Loss, correct tokens, tokens, tokens with a weight, micro-batches of all replicas: fp64 [5]. One all-reduce."""
        counts = [sum(b.num_tokens for b in batches), sum(b.num_loss_tokens for b in batches), len(batches)]
        host = torch.tensor(counts, dtype=torch.float64, device=self.device)
        return self.replicas.all_reduce_(torch.stack([loss.double(), correct.double(), *host]))

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
        self._kept = None

    def weights_replaced(self) -> None:
        """After all weights and the optimizer's state were replaced, on all ranks: gradients of those before are dropped."""
        self.weight_version += 1
        self._progress = self.optimizer.progress()
        self._has_compared = False
        self.optimizer.zero_grad()
        self.model.zero_grad()
        self._kept = None

    def rejoin(self) -> None:
        """After a command that raised on some rank: forget what may not be the same on all ranks. Call it on all of them."""
        self._has_compared = False
        self.optimizer.rejoin()
        self.model.zero_grad()
        self._kept = None

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
        """Log-probabilities of ``samples`` under the current weights, at their temperatures; nothing changes. Raises
        RequestError for samples that cannot be packed."""
        logprobs, correct = [0.0] * len(samples), [0.0] * len(samples)
        tokens: list[list[float]] = [[] for _ in samples]
        self._catch_up()
        self._pace.begin()
        self._make_room()
        for batch in pack(samples, self.max_micro_batch_tokens):
            inverse = inverse_temperatures([samples[index] for index in batch.sample_index], self.device)
            scored = self.model.sequence_logprobs(batch.to(self.device), inverse)
            self._pace.give_way()
            predicted = scored.tokens.roll(1)  # at the tokens themselves; nothing predicts the first of a sequence
            for index, own in zip(batch.sample_index, predicted.split(batch.lengths), strict=True):
                tokens[index] = own.tolist()
            for index, logprob, hits in zip(
                batch.sample_index, scored.sequences.tolist(), scored.correct.tolist(), strict=True
            ):
                logprobs[index], correct[index] = logprob, hits
        return ScoreResult(logprobs, [sum(s.weights) for s in samples], correct, tokens)

    def peak_memory_bytes(self) -> int:
        """Peak GPU memory of this rank beyond the served weights since its memory was planned; 0 on CPU."""
        if self.device.type != "cuda":
            return 0
        peak = self._replays.peak_memory_bytes() if self._replays else torch.cuda.max_memory_allocated(self.device)
        return peak + self.tp.peers.allocated_bytes()

    def _make_room(self) -> None:
        if self._replays is not None:
            self._replays.release()


def _read(sums: Tensor) -> tuple[float, float, int, int, int]:
    loss, correct, *counts = sums.tolist()
    return loss, correct, *(int(count) for count in counts)  # type: ignore[return-value]
