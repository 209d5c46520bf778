"""Forward-only work of a job: reference log-probabilities for DPO before its first step, and the validation loss."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.jobs.rank_link import Ask
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.samples.sample_file import Pair, read_records, write_records
from apollo_tp.wire import commands

T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]
"""Runs a function that reads samples on a thread, and returns its value."""
SCORE_BATCH = 32
"""Samples per Score command."""
EVALUATIONS_PER_JOB = 10


class Reference(msgspec.Struct, frozen=True):
    """Summed log-probabilities (nats) of a pair under the weights from before the job's first step."""

    preferred: float
    rejected: float


def _mean(total: float, weight: float) -> float | None:
    """``total / weight``, or None if that is not finite: JSON cannot express NaN or infinity."""
    return total / weight if weight and math.isfinite(total) else None


class Scored(NamedTuple):
    """A sample under the weights of that moment: its weighted log-probability (nats, summed over its tokens), the sum of its
    weights, the weighted number of tokens that are the arg max, and the log-probability of each token, if asked for."""

    logprob: float
    weight: float
    num_correct: float
    token_logprobs: list[float]


async def score(samples: Sequence[commands.Sample], ask: Ask, per_token: bool = False) -> list[Scored]:
    """Score samples with the current weights."""
    found: list[Scored] = []
    for start in range(0, len(samples), SCORE_BATCH):
        done = await _score(list(samples[start : start + SCORE_BATCH]), ask, per_token)
        tokens = done.token_logprobs or [[] for _ in done.logprobs]
        found += map(Scored, done.logprobs, done.weights, done.num_correct, tokens)
    return found


async def _score(samples: list[commands.Sample], ask: Ask, per_token: bool = False) -> commands.ScoreDone:
    done = await ask(commands.Score(id=f"score/{secrets.token_hex(8)}", samples=samples, per_token=per_token))
    assert isinstance(done, commands.ScoreDone)
    return done


class Evaluator:
    """Scores the preference pairs and the validation samples of ``job``. ``ask`` sends a command and awaits its reply;
    ``in_thread`` runs what reads samples."""

    def __init__(self, job: Job, store: Store, ask: Ask, in_thread: InThread[Any]) -> None:
        self.job, self.store, self._ask, self._in_thread = job, store, ask, in_thread
        self._interval = max(1, job.total_steps // EVALUATIONS_PER_JOB)
        self._counted_from = job.step  # after a restart, the next interval is early enough
        self._evaluated_at: int | None = None

    def next_evaluation(self) -> int:
        """The number of completed steps at which ``evaluate`` is due next."""
        if not self.job.num_validation:
            return self.job.total_steps
        return (self._counted_from // self._interval + 1) * self._interval

    async def prepare(self) -> None:
        """For DPO: score all pairs with the current weights, once per job, and store the result.

        After a crash before the first step, all pairs are scored again: other jobs may have trained in between. Returns
        early if a client asked to cancel or pause the job.
        """
        if self.job.spec.method != "dpo":
            return
        path = self.store.samples_dir / f"{self.job.id}.ref"
        if self.job.step > 0 and path.exists():
            return
        self.store.save_job(self.job, "Computing reference log-probabilities", type="message")
        references = []
        for part, count in (("train", self.job.num_samples), ("valid", self.job.num_validation)):
            for start in range(0, count, SCORE_BATCH // 2):
                if self.job.wanted:
                    return
                indices = range(start, min(start + SCORE_BATCH // 2, count))
                pairs = await self._in_thread(functools.partial(self._read, part, indices, Pair))
                scores = await self._score([side for pair in pairs for side in (pair.preferred, pair.rejected)])
                values = scores.logprobs
                references += [Reference(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        await self._in_thread(functools.partial(write_records, path, references))
        self.store.disk.count(path)

    def pairs(self, part: str, indices: Sequence[int]) -> list[commands.PreferencePair]:
        """Pairs of ``part`` ("train" or "valid") with their reference log-probabilities. Call it on a thread."""
        offset = self.job.num_samples if part == "valid" else 0
        references = read_records(
            self.store.samples_dir / f"{self.job.id}.ref", [offset + index for index in indices], Reference
        )
        return [
            commands.PreferencePair(pair.preferred, pair.rejected, reference.preferred, reference.rejected)
            for pair, reference in zip(self._read(part, indices, Pair), references, strict=True)
        ]

    async def evaluate(self) -> bool:
        """Compute and store the validation loss with the weights after the job's last step.

        The loss is in nats per token; for DPO it is the mean loss of a pair. Returns False if there are no validation
        samples, the loss is known already, or a client asked to cancel or pause the job.
        """
        job = self.job
        if not job.num_validation or self._evaluated_at == job.step:
            return False
        total = weight = correct = 0.0
        for start in range(0, job.num_validation, SCORE_BATCH):
            if job.wanted:
                return False
            indices = range(start, min(start + SCORE_BATCH, job.num_validation))
            if job.spec.method == "dpo":
                pairs = await self._in_thread(functools.partial(self.pairs, "valid", indices))
                losses = await self._pair_losses(pairs)
                total, weight = total + sum(losses), weight + len(losses)
                correct += sum(loss < math.log(2.0) for loss in losses)
            else:
                samples = await self._in_thread(functools.partial(self._read, "valid", indices, commands.Sample))
                done = await self._score(samples)
                total, weight = total - sum(done.logprobs), weight + sum(done.weights)
                correct += sum(done.num_correct)
        self._counted_from = self._evaluated_at = job.step
        job.valid_loss, job.valid_token_accuracy = _mean(total, weight), _mean(correct, weight)
        data = {"step": job.step, "total_steps": job.total_steps, "valid_loss": job.valid_loss,
                "valid_mean_token_accuracy": job.valid_token_accuracy}  # fmt: skip
        shown = "not finite" if job.valid_loss is None else f"{job.valid_loss:.4f}"
        message = f"Step {job.step}/{job.total_steps}: validation loss={shown}"
        self.store.save_job(job, message, type="metrics", data=data)
        return True

    async def _pair_losses(self, pairs: list[commands.PreferencePair]) -> list[float]:
        done = await self._score([side for pair in pairs for side in (pair.preferred, pair.rejected)])
        losses = []
        for index, pair in enumerate(pairs):
            preferred, rejected = done.logprobs[2 * index : 2 * index + 2]
            margin = (preferred - pair.reference_preferred) - (rejected - pair.reference_rejected)
            # -log sigmoid(beta * margin), Rafailov et al. 2023, eq. 7, without overflow for large negative margins
            scaled = self.job.spec.beta * margin
            losses.append(max(-scaled, 0.0) + math.log1p(math.exp(-abs(scaled))))
        return losses

    async def _score(self, samples: list[commands.Sample]) -> commands.ScoreDone:
        return await _score(samples, self._ask)

    def _read(self, part: str, indices: Sequence[int], type: type[T]) -> list[T]:
        return read_records(self.store.samples_dir / f"{self.job.id}.{part}", indices, type)
