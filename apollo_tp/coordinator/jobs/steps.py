"""The commands of a job's steps, by its method, and the evaluations between them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from apollo_tp.coordinator.jobs.evaluation import Evaluator, InThread
from apollo_tp.coordinator.jobs.job import Job, batch_indices
from apollo_tp.coordinator.jobs.rank_link import Ask
from apollo_tp.coordinator.jobs.rollouts import Rollouts, summary
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.samples.sample_file import read_records
from apollo_tp.coordinator.settings import Settings
from apollo_tp.wire import commands

STEPS_IN_FLIGHT = 2


class RewardEvaluator(Evaluator):
    """Of a reinforcement job: the mean reward of completions for the prompts of its validation file."""

    def __init__(self, job: Job, store: Store, ask: Ask, in_thread: InThread[Any], rollouts: Rollouts) -> None:
        super().__init__(job, store, ask, in_thread)
        self._rollouts = rollouts
        self._interval = job.spec.eval_interval or self._interval

    async def evaluate(self) -> bool:
        """Sample, grade and store the mean. Returns False as Evaluator's."""
        job = self.job
        if not job.num_validation or self._evaluated_at == job.step:
            return False
        graded = await self._rollouts.validate(job)
        if graded is None:
            return False
        self._counted_from = self._evaluated_at = job.step
        found = summary(graded)
        job.valid_reward = found.pop("reward_mean")
        data = {"step": job.step, "total_steps": job.total_steps, "valid_reward_mean": job.valid_reward} | found
        shown = "no reward" if job.valid_reward is None else f"mean reward {job.valid_reward:.3f}"
        self.store.save_job(job, f"Step {job.step}/{job.total_steps}: validation, {shown}", type="metrics", data=data)
        return True


class Steps:
    """The steps of ``job``. ``in_flight`` of them may be sent before the first is done: one of a reinforcement job, whose
    completions come from the weights after the step before."""

    def __init__(
        self, job: Job, settings: Settings, store: Store, ask: Ask, in_thread: InThread[Any], rollouts: Rollouts
    ) -> None:
        self._job, self._settings, self._store, self._in_thread, self._rollouts = (
            job,
            settings,
            store,
            in_thread,
            rollouts,
        )
        reinforced = job.spec.method == "reinforcement"
        self.in_flight = 1 if reinforced else STEPS_IN_FLIGHT
        self.evaluator = (
            RewardEvaluator(job, store, ask, in_thread, rollouts)
            if reinforced
            else Evaluator(job, store, ask, in_thread)
        )

    async def command(self, step: int) -> commands.AnyCommand | None:
        """The command of a step. None if a client asked to cancel or pause the job while its samples were made."""
        if self._job.spec.method != "reinforcement":
            command: commands.AnyCommand = await self._in_thread(functools.partial(self._of_stored_samples, step))
            return command
        samples = await self._rollouts.batch(self._job, step)
        return None if samples is None else self._step(step, samples)

    def _of_stored_samples(self, step: int) -> commands.AnyCommand:
        """Shuffling an epoch and decoding samples take time: call it on a thread."""
        job = self._job
        indices = batch_indices(job.spec, job.num_samples, step)
        if job.spec.method == "dpo":
            pairs = self.evaluator.pairs("train", indices)
            return self._made(functools.partial(commands.PreferenceStep, pairs=pairs, beta=job.spec.beta), step)
        return self._step(step, read_records(self._store.samples_dir / f"{job.id}.train", indices, commands.Sample))

    def _step(self, step: int, samples: list[commands.Sample]) -> commands.AnyCommand:
        loss, staleness = self._job.spec.loss, self._settings.rl.max_staleness
        return self._made(functools.partial(commands.Step, samples=samples, loss=loss, max_staleness=staleness), step)

    def _made(self, make: Callable[..., commands.AnyCommand], step: int) -> commands.AnyCommand:
        job = self._job
        return make(
            id=f"{job.id}/{step}",
            job_id=job.id,
            job_step=step,
            num_job_steps=job.total_steps,
            learning_rate_scale=job.spec.learning_rate_scale,
        )
