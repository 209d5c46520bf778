"""The guard of a job: a number is measured before its first step and every some steps, and says whether to go on.

The number is the validation loss, or what the operator's command (``service.guard_command``) prints. All that the guard
knows is in the job's record before it acts: after a crash it goes on where it was, with the number from before the job.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path

from apollo_tp.coordinator.jobs.evaluation import Evaluator
from apollo_tp.coordinator.jobs.guard_command import GuardCommand
from apollo_tp.coordinator.jobs.job import Checkpoint, GuardState, Job
from apollo_tp.coordinator.jobs.rank_link import RanksGoneError
from apollo_tp.coordinator.jobs.saving import Saver
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.samples.schema import Guard
from apollo_tp.errors import ApolloTpError


class RolledBackError(ApolloTpError):
    """A job made the served model worse than its guard allows, and what it learned was undone."""


class GuardFailedError(ApolloTpError):
    """A guard could not measure, or could not undo what it was to undo."""


class Guardian:
    """Guards ``job``, if its request asks for it; without a guard, nothing is ever due.

    ``evaluate`` computes the job's validation loss unless it is known. Raises RanksGoneError, RankFailedError, DeadlineError
    as the commands that it sends.
    """

    def __init__(
        self,
        job: Job,
        evaluator: Evaluator,
        evaluate: Callable[[Evaluator], Awaitable[None]],
        store: Store,
        saver: Saver,
        command: GuardCommand,
    ) -> None:
        self._job, self._guard, self._evaluator, self._evaluate = job, job.spec.guard, evaluator, evaluate
        self._store, self._saver, self._command = store, saver, command

    async def begin(self) -> None:
        """Before the first step: measure, and write the checkpoint to which the job may be rolled back. After a crash in the
        middle of a rollback: complete it. Raises GuardFailedError; then nothing was trained."""
        job, guard = self._job, self._guard
        if guard is None:
            return
        if job.guard is not None:
            if job.guard.verdict == "rollback":
                await self._roll_back(guard, job.guard)
            return
        baseline = await self._measure(guard)
        if job.wanted:
            return
        if baseline is None:
            raise GuardFailedError(
                f"{_name(guard)}: got no finite number before the first step, expected one to compare with"
            )
        state = GuardState(baseline=baseline, value=baseline)
        if guard.action == "rollback":
            snapshot = await self._saver.request("guard", job)
            error = await self._saver.written(snapshot)
            if isinstance(error, RanksGoneError):
                raise error
            if error is not None:
                raise GuardFailedError(f"no checkpoint to roll back to, so nothing was trained: {error}")
            state.snapshot = snapshot.id
        job.guard = state
        message = f"Guard: {_name(guard)}={baseline:.4f} before the first step"
        await self._store.save_job(job, message, type="guard", data=self._data(state))

    def next_check(self) -> int:
        """The number of completed steps at which ``is_due`` may be true next."""
        guard, job = self._guard, self._job
        if guard is None or self.is_due():
            return job.total_steps if guard is None else job.step
        return min(job.total_steps, (job.step // guard.every + 1) * guard.every)

    def is_due(self) -> bool:
        """Whether ``check`` is to be called before the next step."""
        guard, job = self._guard, self._job
        if guard is None or job.guard is None or job.wanted or not job.step or job.guard.step == job.step:
            return False
        return job.step % guard.every == 0 or job.step >= job.total_steps

    async def check(self) -> None:
        """Measure, and act if the number is worse by more than it may be. Raises RolledBackError once that is done."""
        job, guard, state = self._job, self._guard, self._job.guard
        assert guard is not None
        assert state is not None
        value = await self._measure(guard)
        if job.wanted:  # as it is when a client cancels meanwhile: nothing was measured
            return
        state.step, state.value = job.step, value
        worse = self._is_worse(guard, state)
        state.verdict = guard.action if worse else ""
        shown = "no finite number" if value is None else f"{value:.4f}"
        message = f"Guard: {_name(guard)}={shown} at step {job.step}, {state.baseline:.4f} before the job"
        if worse:
            message += f"; worse by more than {guard.max_worse:g}: {guard.action}"
        await self._store.save_job(
            job, message, type="guard", level="warn" if worse else "info", data=self._data(state)
        )
        if worse and guard.action == "pause":
            job.wanted = "pause"
        elif worse and guard.action == "rollback":
            await self._roll_back(guard, state)

    async def _measure(self, guard: Guard) -> float | None:
        """The number; None if it is not finite, or if the command says that all is bad."""
        if guard.measure == "command":
            return await self._command.run(self._job)
        await self._evaluate(self._evaluator)
        return self._job.valid_reward if self._of_rewards else self._job.valid_loss

    @property
    def _of_rewards(self) -> bool:
        """Whether the validation file gives the mean reward of completions, of which more is better."""
        guard = self._guard
        return guard is not None and guard.measure == "validation" and self._job.spec.method == "reinforcement"

    def _is_worse(self, guard: Guard, state: GuardState) -> bool:
        if state.value is None or not math.isfinite(state.value):
            return True
        change = state.value - state.baseline
        return (-change if guard.higher_is_better or self._of_rewards else change) > guard.max_worse

    async def _roll_back(self, guard: Guard, state: GuardState) -> None:
        job, snapshot = self._job, self._saver.checkpoint(state.snapshot)
        if snapshot is None:
            raise GuardFailedError(f"rollback: got no checkpoint {state.snapshot}, expected the one of before the job")
        if not _is_done(snapshot, state):
            asked = await self._saver.restore(snapshot, "guard")
            assert asked.restore is not None
            state.restore_id = asked.restore.id
            await self._store.save_job(job)
            error = await self._saver.written(asked)
            if isinstance(error, RanksGoneError):
                raise error
            if error is not None:
                raise GuardFailedError(
                    f"rollback to {snapshot.name}: {error}; the weights are those after step {job.step}"
                )
            snapshot = asked
        assert snapshot.restore is not None
        job.weight_version = snapshot.restore.weight_version
        shown = "no finite number" if state.value is None else f"{state.value:.4f}"
        raise RolledBackError(
            f"guard: got {_name(guard)}={shown} at step {state.step}, expected at most {guard.max_worse:g} worse than "
            f"{state.baseline:.4f} before the job; rolled back to {_place(snapshot)}, as weight version "
            f"{snapshot.restore.weight_version}"
        )

    def _data(self, state: GuardState) -> dict[str, object]:
        return {"step": self._job.step, "baseline": state.baseline, "value": state.value, "verdict": state.verdict}


def _place(snapshot: Checkpoint) -> str:
    """What was put back."""
    if snapshot.restore is not None and snapshot.restore.lost:
        return (
            f"checkpoint {Path(snapshot.fallback).name}, which is older than the job: the snapshot in host memory of before "
            "it was lost with the trainer, and what was learned in between is undone too"
        )
    return (
        "the snapshot in host memory of before it" if snapshot.fallback else f"checkpoint {snapshot.name} of before it"
    )


def _is_done(snapshot: Checkpoint, state: GuardState) -> bool:
    restore = snapshot.restore
    return restore is not None and restore.id == state.restore_id and restore.state == "succeeded"


def _name(guard: Guard) -> str:
    return "validation loss" if guard.measure == "validation" else "guard command"
