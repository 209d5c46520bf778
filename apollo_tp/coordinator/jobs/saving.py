"""Checkpoint requests of clients, of jobs and of the idle timer; one is written at a time, between two steps."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from apollo_tp.coordinator.jobs.job import Checkpoint, Job
from apollo_tp.coordinator.jobs.rank_link import Ask, RankLink, RanksGoneError
from apollo_tp.coordinator.jobs.storage_error import StorageError
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ApolloTpError
from apollo_tp.wire import commands

log = logging.getLogger(__name__)


class Saver:
    """Sends checkpoint requests to the ranks and records what became of them.

    ``ask`` sends a command and awaits its reply, ``live`` finds a job by its id, and ``wake`` tells the scheduler that a
    request was stored or is finished. One command is sent at a time: if several were queued at rank 0, the deadline of the
    last one would run out while the first one is written.

    A request that was accepted is written also if rank 0 or this process ends meanwhile, by the next one. A job's own is
    not: the job is interrupted then, and requests another.
    """

    def __init__(
        self, store: Store, link: RankLink, ask: Ask, live: Callable[[str], Job | None], wake: Callable[[], None]
    ) -> None:
        self._store, self._link, self._ask, self._live, self._wake = store, link, ask, live, wake
        self._current: tuple[str, asyncio.Task[ApolloTpError | None]] | None = None
        self._queue: list[Checkpoint] = []
        """Requests that are not finished, the oldest first."""
        self.last_failure = 0.0

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._current is not None

    async def request(
        self,
        reason: str,
        job: Job | None = None,
        metrics: dict[str, float | None] | None = None,
        idempotency: tuple[str, str, str] | None = None,
    ) -> Checkpoint:
        """Store a request for a checkpoint and return its record, or that of the same request that came earlier.

        ``reason`` is "request", "job" or "idle". Client requests share one checkpoint until it is sent to the ranks. Raises
        StorageError; then nothing was requested.
        """
        now = time.time()
        checkpoint = self._waiting(reason) if reason == "request" else None
        is_new = checkpoint is None
        checkpoint = checkpoint or Checkpoint(
            id=f"ckpt-{secrets.token_hex(8)}",
            name=_name(time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))),
            state="queued",
            reason=reason,
            created_at=now,
            job_id=job.id if job else "",
            step=job.step if job else 0,
            metrics=metrics or {},
        )
        if is_new:
            self._queue.append(checkpoint)
        try:
            known = await self._store.add_checkpoint(checkpoint, idempotency, required=reason != "request")
        except StorageError:
            if is_new and checkpoint in self._queue:
                self._queue.remove(checkpoint)
            raise
        self._wake()
        return checkpoint if known == checkpoint.id else self._store.checkpoint(known) or checkpoint

    def recover(self) -> None:
        """At start: requests that were not completed are kept, except those of jobs, which request theirs again."""
        for checkpoint in reversed(self._store.queued_checkpoints()):
            self._queue.append(checkpoint)
            self._interrupted(checkpoint, "the coordinator ended before it was written")
            self._store.save_checkpoint(checkpoint)

    def send(self) -> None:
        """Start writing the oldest request in the queue, unless a checkpoint is being written."""
        if self._queue and self._current is None:
            checkpoint = self._queue[0]
            self._current = (checkpoint.id, asyncio.create_task(self._write(checkpoint)))

    async def written(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        """Wait until ``checkpoint`` is written. Returns None, or the error that it failed with."""
        while True:
            self.send()
            assert self._current is not None  # at least ``checkpoint`` is in the queue
            identity, task = self._current
            failure = await task
            if isinstance(failure, RanksGoneError) and checkpoint in self._queue:
                self._interrupted(checkpoint, str(failure))
                await self._store.save_checkpoint(checkpoint)
            if identity == checkpoint.id or isinstance(failure, RanksGoneError):
                return failure

    async def _write(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        failure: ApolloTpError | None = None
        try:
            done = await self._ask(commands.SaveCheckpoint(id=self._link.new_id("save"), name=checkpoint.name))
            assert isinstance(done, commands.CheckpointDone)
            checkpoint.state, checkpoint.path, checkpoint.num_bytes = "succeeded", done.path, done.num_bytes
            checkpoint.seconds, checkpoint.weight_version = done.seconds, done.weight_version
            if done.weight_version == self._link.weight_version:
                self._store.set_meta("unsaved", "")
            self._finished(checkpoint)
        except RanksGoneError as error:
            log.error("checkpoint %s was not written: %s", checkpoint.name, error)
            failure = error
            self._interrupted(checkpoint, str(error))
        except ApolloTpError as error:
            log.error("checkpoint %s failed: %s", checkpoint.name, error)
            failure, checkpoint.state, checkpoint.error = error, "failed", str(error)
            self.last_failure = time.monotonic()
            self._finished(checkpoint)
        finally:
            self._current = None
        await self._store.save_checkpoint(checkpoint)
        if checkpoint.state == "queued":
            self._wake()  # to send it to the next trainer
            return failure
        job = self._live(checkpoint.job_id) if checkpoint.job_id else None
        if job is not None:
            ok = checkpoint.state == "succeeded"
            message = f"Checkpoint written: {checkpoint.path}" if ok else f"Checkpoint failed: {checkpoint.error}"
            data = {"checkpoint_id": checkpoint.id, "path": checkpoint.path}
            self._store.save_job(job, message, type="checkpoint", level="info" if ok else "warn", data=data)
        self._wake()
        return failure

    def _interrupted(self, checkpoint: Checkpoint, reason: str) -> None:
        """A process ended before ``checkpoint`` was written. It stays in the queue unless it is a job's; under another name,
        since the ranks may have written the old one, or may still be writing it."""
        if checkpoint.reason == "job":
            checkpoint.state, checkpoint.error = "failed", reason
            self._finished(checkpoint)
        else:
            checkpoint.name = _name(checkpoint.name.rpartition("-")[0])

    def _finished(self, checkpoint: Checkpoint) -> None:
        checkpoint.finished_at = time.time()
        self._queue.remove(checkpoint)

    def _waiting(self, reason: str) -> Checkpoint | None:
        sent = self._current[0] if self._current else ""
        return next((each for each in self._queue if each.reason == reason and each.id != sent), None)


def _name(stamp: str) -> str:
    return f"{stamp}-{secrets.token_hex(3)}"
