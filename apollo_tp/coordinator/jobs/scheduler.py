"""The scheduler decides which command rank 0 gets next and records the replies; nothing else writes a job's progress.

Up to two steps of a job are in flight, so that the ranks never wait for this process. To cancel or pause a job, the next
step is not sent. After a crash a job resumes after its last completed step: where replies were lost, rank 0's Hello says
which step was completed last (see commands.Identify).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from apollo_tp.config import OnCrash
from apollo_tp.coordinator.jobs.client_requests import ClientRequests
from apollo_tp.coordinator.jobs.evaluation import Evaluator, Scored, score
from apollo_tp.coordinator.jobs.guard_command import GuardCommand
from apollo_tp.coordinator.jobs.guarding import Guardian
from apollo_tp.coordinator.jobs.job import Job, JobError, State, model_changed
from apollo_tp.coordinator.jobs.progress import Progress
from apollo_tp.coordinator.jobs.rank_link import RankLink, RanksGoneError
from apollo_tp.coordinator.jobs.rollouts import Rollouts
from apollo_tp.coordinator.jobs.saving import Saver
from apollo_tp.coordinator.jobs.steps import STEPS_IN_FLIGHT, Steps
from apollo_tp.coordinator.jobs.storage_error import StorageError
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.settings import Settings
from apollo_tp.errors import ApolloTpError, DeadlineError, RankFailedError
from apollo_tp.wire import commands

log = logging.getLogger(__name__)
T = TypeVar("T")

CHECKPOINT_FACTOR = 10
"""The deadline of a checkpoint is this many times that of a step: 140 GB may have to be written to a slow disk, or read."""
JOB_FAILURES = (ApolloTpError, OSError, msgspec.MsgspecError)
"""Errors that fail one job and leave the coordinator running. The last two: its samples cannot be read."""
OnStep = Callable[[Job, commands.StepFigures], None]
Pending = tuple[int, asyncio.Future[commands.AnyReply]]


class Scheduler:
    """Runs jobs one after the other, writes requested checkpoints between steps, and one when idle.

    Listeners (metrics, writers): ``on_step(job, figures)`` is called after each completed step, ``on_evaluation(job)`` after
    each validation loss. ``model`` is the digest of the served model (model_digest): jobs whose samples were made for
    another model fail instead of being trained.
    """

    def __init__(self, settings: Settings, store: Store, link: RankLink, model: str = "") -> None:
        self.settings, self.store, self.link, self.model = settings, store, link, model
        self.progress = Progress()
        self.running: Job | None = None
        self.on_step: list[OnStep] = []
        self.on_evaluation: list[Callable[[Job], None]] = []
        self.recent_losses: collections.deque[tuple[str, int, float]] = collections.deque(maxlen=50)
        self._wake = asyncio.Event()
        self._idle_since = time.monotonic()
        self.saver = Saver(store, link, self.ask, self.live, self.wake, lambda: self.running)
        self._rollouts = Rollouts(settings, store, link, self._in_thread)
        self._guard_command = GuardCommand(settings.service.guard_command, settings.service.guard_seconds)
        self._requests = ClientRequests(self.ask, self._is_training, settings.command_timeout_seconds)
        self._guard_command.on_start = self._requests.job_advanced
        # its own: requests that are rendered keep the threads that all share busy
        self._thread = ThreadPoolExecutor(1, "scheduler")

    # --- what HTTP handlers call -------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look again for work: something was stored that may need a command."""
        self._wake.set()

    def live(self, job_id: str) -> Job | None:
        """The newest state of the job of this id; None if there is none."""
        return self.store.job(job_id)

    async def score(self, samples: Sequence[commands.Sample], per_token: bool = False) -> list[Scored]:
        """Score a client's samples (see ``evaluation.score``); between two steps if a job runs. Raises RequestError 429 if
        too many requests wait, RanksGoneError, RankFailedError, DeadlineError."""
        with self._requests.admitted():
            return await score(samples, self._requests.ask, per_token)

    def _is_training(self) -> bool:
        """Whether a job keeps the ranks busy: not while completions are sampled for it, nor while the guard's command runs,
        which may ask too."""
        return self.running is not None and not (self._rollouts.busy or self._guard_command.runs)

    # --- start, crash, reconnection -----------------------------------------------------------------------------------

    def has_unrecorded_steps(self) -> bool:
        """True if a step of some job may have been completed without its reply having been recorded."""
        return any(job.resumable for job in self.store.active.in_states(State.queued, State.paused))

    def recover(self) -> None:
        """At start: resume or fail the jobs that were running when the last coordinator ended (service.on_crash)."""
        for job in self.store.jobs(State.running):
            self._interrupt(job, "the coordinator ended while the job ran")
        self.saver.recover()

    def _interrupt(self, job: Job, reason: str) -> None:
        wanted, job.wanted = job.wanted, ""
        if wanted == "cancel":
            self._finish(job, State.cancelled, "Job cancelled")
        elif self.settings.service.on_crash is OnCrash.fail:
            self._fail(job, JobError(code="interrupted", message=f"{reason}, after step {job.step}"))
        else:
            job.state = State.paused if wanted == "pause" else State.queued
            job.resumable = True
            self.store.save_job(
                job, f"Interrupted after step {job.step}: {reason}; it will go on from there", level="warn"
            )

    def reconcile(self, hello: commands.Hello) -> None:
        """Compare the interrupted jobs with rank 0's Hello: count completed steps whose replies were lost.

        Otherwise such a step would run twice. Steps of an earlier server process do not count: their weights are gone.
        """
        if self.store.get_meta("server_life") != hello.server_life:
            self.store.set_meta("server_life", hello.server_life)
            self.store.set_meta("unsaved", "")
        self.saver.reconcile(hello)
        for job in self.store.jobs(State.queued, State.paused):
            if not job.resumable:
                continue
            if job.id == hello.last_job_id and job.step < hello.last_job_step and job.server_life == hello.server_life:
                lost = hello.last_job_step - job.step
                job.step, job.weight_version = hello.last_job_step, hello.weight_version
                self.store.set_meta("unsaved", "1")
                self.store.save_job(
                    job,
                    f"{lost} completed step(s) up to step {job.step} were counted; their figures were lost",
                    level="warn",
                )
            job.resumable = job.state is State.queued and job.step > 0
            self.store.save_job(job)

    def orphan_reply(self, reply: commands.AnyReply) -> None:
        """Record a step whose reply nobody awaits: sent to an earlier coordinator process, or after its deadline.

        The step is in the weights. It is counted if it is the next one of its job; a later one means that earlier
        replies were lost, and rank 0's Hello tells which step was the last.
        """
        if not isinstance(reply, commands.StepDone):
            return
        if not reply.figures.skipped:
            self.store.set_meta("unsaved", "1")
        job_id, _, step = reply.id.rpartition("/")
        job = self.store.job(job_id) if job_id else None
        if job is not None and job is not self.running and step == str(job.step + 1):
            self._record_step(job, reply)

    async def run(self) -> None:
        """Run jobs and write checkpoints until cancelled. While rank 0 is lost, wait for its next Hello."""
        while True:
            self._wake.clear()
            await self.link.ready()
            try:
                await self._work()
            except RanksGoneError as error:
                log.warning("waiting for the trainer: %s", error)
                if self.link.connected and self.link.hello is not None:
                    # the next trainer connected while the job still counted as running: reconcile() did not see it
                    self.reconcile(self.link.hello)

    async def _work(self) -> None:
        self.saver.send()
        if queued := self.store.active.first(1, State.queued):
            await self._run_job(queued[0])
            self._idle_since = time.monotonic()
            return
        after = self.settings.checkpoint_after_idle_seconds
        timeout = None
        if after is not None and self.store.get_meta("unsaved") and not self.saver.busy:
            timeout = max(self._idle_since, self.saver.last_failure) + after - time.monotonic()
            if timeout <= 0:
                await self.saver.request("idle")
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wake.wait()

    # --- one job ------------------------------------------------------------------------------------------------------

    async def _run_job(self, job: Job) -> None:
        hello = self.link.hello
        assert hello is not None  # no await between reading the queue and `self.running = job`: see jobs' actions
        if job.model_digest != self.model:
            self._fail(job, model_changed(hello.model_path))
            return
        if job.step > 0 and job.server_life != hello.server_life:
            message = (
                f"step {job.step} was trained into a server ({job.server_life}) whose weights are gone; "
                f"got {hello.server_life}. Start the job again"
            )
            self._fail(job, JobError(code="server_restarted", message=message))
            return
        self.running = job
        self.progress = Progress(job.id)
        resumed = job.step > 0
        job.state, job.server_life, job.resumable, job.wanted = State.running, hello.server_life, False, ""
        job.started_at = job.started_at or time.time()
        self.store.save_job(job, f"Job running from step {job.step + 1}" if resumed else "Job running")
        try:
            # stored before the first step is sent: otherwise, after a crash, the job before it would be taken for the one
            # whose steps rank 0 reports, and steps would be run twice
            await self.store.stored()
            await self._train(job)
        except RanksGoneError as error:
            self._interrupt(job, str(error))
            raise
        except RankFailedError as error:
            failure = JobError(code="rank_failed", message=str(error), rank=error.rank, traceback=error.traceback)
            self._fail(job, failure)
        except StorageError:  # ends the coordinator: no state of a job can be stored
            raise
        except JOB_FAILURES as error:
            self._fail(job, JobError(code=type(error).__name__, message=str(error)))
        finally:
            self.running = None
            self._requests.job_advanced()
            self.store.on_change(job.id)

    async def _train(self, job: Job) -> None:
        steps = Steps(job, self.settings, self.store, self._ask_for_job, self._in_thread, self._rollouts)
        await steps.evaluator.prepare()
        guard = Guardian(job, steps.evaluator, self._evaluate, self.store, self.saver, self._guard_command)
        await guard.begin()
        pending: collections.deque[Pending] = collections.deque()
        try:
            while True:
                self.saver.send()
                await self.store.room()
                await self._send_steps(job, steps, pending, guard.next_check())
                if not pending:
                    if guard.is_due():
                        await guard.check()
                        continue
                    if job.wanted or job.step >= job.total_steps:
                        break
                    await self._evaluate(steps.evaluator)
                    continue
                done = await self._reply(pending.popleft()[1])
                assert isinstance(done, commands.StepDone)
                self._record_step(job, done)
                self._requests.job_advanced()
                self._check_skips(job, done.figures)
        except JOB_FAILURES:
            await self._drain(job, pending)
            raise
        await self._end(job, steps.evaluator)

    async def _send_steps(self, job: Job, steps: Steps, pending: collections.deque[Pending], until: int) -> None:
        """Send what may be in flight, up to the step ``until`` or the next evaluation."""
        limit = min(job.total_steps, steps.evaluator.next_evaluation(), until)
        while len(pending) < steps.in_flight and not job.wanted and job.step + len(pending) < limit:
            step = job.step + len(pending) + 1
            command = await steps.command(step)
            if command is None:
                return
            pending.append((step, await self.link.send(command)))

    async def _evaluate(self, evaluator: Evaluator) -> None:
        if await evaluator.evaluate():
            for listener in self.on_evaluation:
                listener(evaluator.job)

    async def _end(self, job: Job, evaluator: Evaluator) -> None:
        if not job.wanted:
            await self._evaluate(evaluator)
        if not job.wanted and job.spec.save_at_end:
            metrics = {"step": float(job.step), "train_loss": job.loss, "train_mean_token_accuracy": job.token_accuracy,
                       "valid_loss": job.valid_loss, "valid_mean_token_accuracy": job.valid_token_accuracy,
                       "valid_reward_mean": job.valid_reward}  # fmt: skip
            known: dict[str, float | None] = {name: value for name, value in metrics.items() if value is not None}
            error = await self.saver.written(await self.saver.request("job", job, known))
            if isinstance(error, RanksGoneError):
                raise error
        if job.wanted == "cancel":
            self._finish(job, State.cancelled, "Job cancelled")
        elif job.wanted == "pause":
            job.state, job.wanted = State.paused, ""
            self.store.save_job(job, f"Job paused after step {job.step}")
        else:
            self._finish(job, State.succeeded, "The job has successfully completed")

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def ask(self, command: commands.AnyCommand) -> commands.AnyReply:
        """Send a command and await its reply. Raises RanksGoneError, RankFailedError, DeadlineError."""
        patient = isinstance(command, commands.SaveCheckpoint | commands.RestoreCheckpoint)
        return await self._reply(await self.link.send(command), CHECKPOINT_FACTOR if patient else 1)

    async def _ask_for_job(self, command: commands.AnyCommand) -> commands.AnyReply:
        """``ask`` for the running job; clients have their turn after it."""
        try:
            return await self.ask(command)
        finally:
            self._requests.job_advanced()

    async def _reply(self, future: asyncio.Future[commands.AnyReply], patience: int = 1) -> commands.AnyReply:
        # The ranks have a deadline for each collective; this one is for a rank 0 that sends heartbeats but never replies.
        # Rank 0 executes the earlier commands first: the deadline starts again whenever it begins or finishes one.
        usual = STEPS_IN_FLIGHT * self.settings.command_timeout_seconds + self.settings.service.rank_timeout_seconds
        sent, seconds = time.monotonic(), usual * patience
        while (left := max(sent, self.link.progressed_at) + seconds - time.monotonic()) > 0:
            # not wait_for: on Python 3.11 it can swallow a cancellation that comes together with the reply
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, usual)):
                    return await asyncio.shield(future)
            is_slow = self.link.busy_with.startswith(("save/", "restore/"))
            seconds = usual * (CHECKPOINT_FACTOR if is_slow else patience)
        self.link.abandon(future)
        raise DeadlineError(f"rank 0 sent heartbeats but no reply for {seconds:.0f} s; restart the trainer")

    async def _drain(self, job: Job, pending: collections.deque[Pending]) -> None:
        """Wait for the steps in flight and record them, since they are in the weights. A reply that comes too late for this
        goes to ``orphan_reply``."""
        while pending:
            with contextlib.suppress(ApolloTpError):
                done = await self._reply(pending.popleft()[1])
                assert isinstance(done, commands.StepDone)
                self._record_step(job, done)

    def _record_step(self, job: Job, done: commands.StepDone) -> None:
        figures = done.figures
        job.step = int(done.id.rpartition("/")[2])
        job.tokens += figures.num_tokens
        job.loss_tokens += figures.num_loss_tokens
        if figures.weight_version != job.weight_version:  # an update in the backward pass may stop after some matrices
            self.store.set_meta("unsaved", "1")
        job.weight_version, job.padding_share = figures.weight_version, figures.padding_share
        job.training_seconds += figures.step_seconds
        job.metrics = {name: value if math.isfinite(value) else None for name, value in figures.metrics.items()}
        job.skipped_steps = job.skipped_steps + 1 if figures.skipped else 0
        if figures.skipped:
            message = f"Step {job.step}/{job.total_steps}: skipped, {figures.skipped}"
        else:
            job.loss, job.token_accuracy = figures.loss, figures.token_accuracy
            self.recent_losses.append((job.id, job.step, figures.loss))
            message = f"Step {job.step}/{job.total_steps}: training loss={figures.loss:.4f}"
        self.progress.recent.append((time.monotonic(), figures.num_tokens))
        data: dict[str, object] = msgspec.to_builtins(figures)
        if not figures.skipped:
            del data["skipped"]
        data |= {
            "step": job.step, "total_steps": job.total_steps, "tokens_per_second": self.progress.tokens_per_second(),
            "seconds_left": self.progress.seconds_left(job.total_steps - job.step), **figures.metrics,
        }  # fmt: skip
        del data["metrics"]
        self.store.save_job(job, message, type="metrics", level="warn" if figures.skipped else "info", data=data)
        for listener in self.on_step:
            listener(job, figures)

    def _check_skips(self, job: Job, figures: commands.StepFigures) -> None:
        if figures.skipped and job.skipped_steps >= self.settings.max_skipped_steps:
            raise TooManySkipsError(
                f"{job.skipped_steps} steps in a row were skipped ({figures.skipped}), expected fewer than "
                f"{self.settings.max_skipped_steps}; lower the learning rate or look at the data"
            )

    def _finish(
        self, job: Job, state: State, message: str, *, level: str = "info", data: dict[str, object] | None = None
    ) -> None:
        job.state, job.finished_at, job.wanted, job.resumable = state, time.time(), "", False
        self.store.save_job(job, message, level=level, data={"state": state.value} | (data or {}))

    def _fail(self, job: Job, error: JobError) -> None:
        log.error("job %s failed: %s", job.id, error.message)
        job.error = error
        details: dict[str, object] = {"code": error.code}
        if error.rank is not None:
            details |= {"rank": error.rank, "traceback": error.traceback}
        self._finish(job, State.failed, f"Job failed: {error.message}", level="error", data=details)


class TooManySkipsError(ApolloTpError):
    """Too many steps in a row wrote nothing because a value was not finite."""
