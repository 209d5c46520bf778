"""Checkpoint requests of clients, of jobs and of the idle timer; one is written at a time, between two steps."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.jobs.rank_link import Ask, RankLink
from apollo_tp.coordinator.jobs.store import Checkpoint, Store
from apollo_tp.errors import ApolloTpError
from apollo_tp.wire import commands

log = logging.getLogger(__name__)


class Saver:
    """Sends checkpoint requests to the ranks and records what became of them.

    ``ask`` sends a command and awaits its reply, ``live`` finds a job by its id, and ``wake`` tells the scheduler that a
    request was stored or is finished. One command is sent at a time: if several were queued at rank 0, the deadline of the
    last one would run out while the first one is written.
    """

    def __init__(
        self, store: Store, link: RankLink, ask: Ask, live: Callable[[str], Job | None], wake: Callable[[], None]
    ) -> None:
        self._store, self._link, self._ask, self._live, self._wake = store, link, ask, live, wake
        self._current: tuple[str, asyncio.Task[ApolloTpError | None]] | None = None
        self.last_failure = 0.0

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._current is not None

    def request(
        self,
        reason: str,
        job: Job | None = None,
        metrics: dict[str, float | None] | None = None,
        idempotency: tuple[str, str, str] | None = None,
    ) -> Checkpoint:
        """Store a request for a checkpoint and return its record.

        ``reason`` is "request", "job" or "idle". Client requests share one checkpoint until it is sent to the ranks.
        """
        now = time.time()
        checkpoint = self._waiting(reason) if reason == "request" else None
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
        self._store.save_checkpoint(checkpoint, idempotency)
        self._wake()
        return checkpoint

    def recover(self) -> None:
        """At start: requests that were not completed are kept, except those of jobs, which request theirs again.

        Each gets a new name, since the ranks may have written the old one, or may still be writing it.
        """
        for checkpoint in self._store.checkpoints(state="queued"):
            if checkpoint.reason == "job":
                checkpoint.state, checkpoint.error = "failed", "the coordinator ended before it was written"
            checkpoint.name = _name(checkpoint.name.rpartition("-")[0])
            self._store.save_checkpoint(checkpoint)

    def send(self) -> None:
        """Start writing the oldest request in the queue, unless a checkpoint is being written."""
        waiting = self._store.checkpoints(state="queued") if self._current is None else []
        if waiting:
            self._current = (waiting[-1].id, asyncio.create_task(self._write(waiting[-1])))

    async def written(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        """Wait until ``checkpoint`` is written. Returns None, or the error that it failed with."""
        while True:
            self.send()
            assert self._current is not None  # at least ``checkpoint`` is in the queue
            identity, task = self._current
            failure = await task
            if identity == checkpoint.id:
                return failure

    async def _write(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        failure = None
        try:
            done = await self._ask(commands.SaveCheckpoint(id=self._link.new_id("save"), name=checkpoint.name))
            assert isinstance(done, commands.CheckpointDone)
            checkpoint.state, checkpoint.path, checkpoint.num_bytes = "succeeded", done.path, done.num_bytes
            checkpoint.seconds, checkpoint.weight_version = done.seconds, done.weight_version
            if done.weight_version == self._link.weight_version:
                self._store.set_meta("unsaved", "")
        except ApolloTpError as error:
            log.error("checkpoint %s failed: %s", checkpoint.name, error)
            failure, checkpoint.state, checkpoint.error = error, "failed", str(error)
            self.last_failure = time.monotonic()
        finally:
            self._current = None
        checkpoint.finished_at = time.time()
        self._store.save_checkpoint(checkpoint)
        job = self._live(checkpoint.job_id) if checkpoint.job_id else None
        if job is not None:
            ok = checkpoint.state == "succeeded"
            message = f"Checkpoint written: {checkpoint.path}" if ok else f"Checkpoint failed: {checkpoint.error}"
            data = {"checkpoint_id": checkpoint.id, "path": checkpoint.path}
            self._store.save_job(job, message, type="checkpoint", level="info" if ok else "warn", data=data)
        self._wake()
        return failure

    def _waiting(self, reason: str) -> Checkpoint | None:
        sent = self._current[0] if self._current else ""
        waiting = self._store.checkpoints(state="queued")
        return next((each for each in waiting if each.reason == reason and each.id != sent), None)


def _name(stamp: str) -> str:
    return f"{stamp}-{secrets.token_hex(3)}"
