"""Checkpoints that clients, jobs and the idle timer ask for, and those to be put back; one at a time, between two steps."""

from __future__ import annotations

import asyncio
import collections
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from apollo_tp.coordinator.jobs.job import Checkpoint, Job, Restore, State
from apollo_tp.coordinator.jobs.rank_link import Ask, RankLink, RanksGoneError
from apollo_tp.coordinator.jobs.storage_error import StorageError
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ApolloTpError
from apollo_tp.wire import commands

log = logging.getLogger(__name__)

RECENT = 16
"""Finished requests that are kept in memory."""


class Saver:
    """Sends requests to write checkpoints and to restore them to the ranks, in order, and records what became of them.

    ``ask`` sends a command and awaits its reply, ``live`` finds a job by its id, ``running`` is the one that runs, and
    ``wake`` tells the scheduler that a request was stored or is finished. One command is sent at a time: if several were
    queued at rank 0, the deadline of the last one would run out while the first one is written.

    A request that was accepted is written also if rank 0 or this process ends meanwhile, by the next one. A job's own is
    not: the job is interrupted then, and requests another. A restore is sent again unless the ranks say that it was done.
    """

    def __init__(
        self,
        store: Store,
        link: RankLink,
        ask: Ask,
        live: Callable[[str], Job | None],
        wake: Callable[[], None],
        running: Callable[[], Job | None] = lambda: None,
    ) -> None:
        self._store, self._link, self._ask, self._live, self._wake, self._running = (
            store,
            link,
            ask,
            live,
            wake,
            running,
        )
        self._current: tuple[str, asyncio.Task[ApolloTpError | None]] | None = None
        self._queue: list[Checkpoint] = []
        """Requests that are not finished, the oldest first."""
        self._last: collections.OrderedDict[str, Checkpoint] = collections.OrderedDict()
        """Those that were finished last, by id: they may not be stored yet."""
        self.last_failure = 0.0
        self.on_finished: list[Callable[[Checkpoint], None]] = []
        """Called with each checkpoint that was written, or failed."""

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written or put back."""
        return self._current is not None

    async def request(
        self,
        reason: str,
        job: Job | None = None,
        metrics: dict[str, float | None] | None = None,
        idempotency: tuple[str, str, str] | None = None,
    ) -> Checkpoint:
        """Store a request for a checkpoint and return its record, or that of the same request that came earlier.

        ``reason`` is "request", "job", "guard" or "idle". Client requests share one checkpoint until it is sent to the
        ranks. Raises StorageError; then nothing was requested.
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

    async def restore(
        self, checkpoint: Checkpoint, reason: str = "request", idempotency: tuple[str, str, str] | None = None
    ) -> Checkpoint:
        """Store a request to put ``checkpoint``, which was written, back into the served memory. Returns its record.

        ``reason`` is "request" or "guard". One that waits for it already is the same. Raises StorageError; then nothing was
        requested.
        """
        waiting = next((each for each in self._queue if each.id == checkpoint.id), None)
        if waiting is None:
            identity = f"restore-{secrets.token_hex(8)}"
            checkpoint.restore = Restore(id=identity, state="queued", reason=reason, created_at=time.time())
            self._queue.append(checkpoint)
        try:
            await self._store.add_checkpoint(waiting or checkpoint, idempotency, required=reason != "request")
        except StorageError:
            if waiting is None and checkpoint in self._queue:
                self._queue.remove(checkpoint)
            raise
        self._wake()
        return waiting or checkpoint

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        """The newest state of a checkpoint, or None if there is none of this id."""
        waiting = next((each for each in self._queue if each.id == checkpoint_id), None)
        return waiting or self._last.get(checkpoint_id) or self._store.checkpoint(checkpoint_id)

    def recover(self) -> None:
        """At start: requests that were not completed are kept, except those of jobs, which request theirs again."""
        for checkpoint in sorted(self._store.queued_checkpoints(), key=_asked_at):
            self._queue.append(checkpoint)
            self._interrupted(checkpoint, "the coordinator ended before it was written")
            self._store.save_checkpoint(checkpoint)

    def reconcile(self, hello: commands.Hello) -> None:
        """A restore whose answer was lost has been done if the ranks say so: once more, it would undo later steps."""
        for checkpoint in list(self._queue):
            restore = checkpoint.restore
            done = hello.last_restore_id.removesuffix(commands.LOST)
            if restore is not None and restore.state == "queued" and restore.id == done:
                lost = hello.last_restore_id != done
                self._restored(checkpoint, restore, commands.RestoreDone(
                    path=checkpoint.fallback if lost else checkpoint.path, seconds=0.0, weight_version=hello.weight_version,
                ))  # fmt: skip
                self._store.save_checkpoint(checkpoint)

    def send(self) -> None:
        """Begin with the oldest request in the queue, unless one is being worked on."""
        if self._queue and self._current is None:
            checkpoint = self._queue[0]
            work = self._write if checkpoint.state == "queued" else self._put_back
            self._current = (checkpoint.id, asyncio.create_task(work(checkpoint)))

    async def written(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        """Wait until ``checkpoint`` is written, or put back. Returns None, or the error that it failed with."""
        while checkpoint in self._queue or (self._current is not None and self._current[0] == checkpoint.id):
            self.send()
            assert self._current is not None  # at least ``checkpoint`` is in the queue
            identity, task = self._current
            failure = await task
            if isinstance(failure, RanksGoneError) and checkpoint in self._queue:
                self._interrupted(checkpoint, str(failure))
                await self._store.save_checkpoint(checkpoint)
            if identity == checkpoint.id or isinstance(failure, RanksGoneError):
                return failure
        state, message = (checkpoint.restore or checkpoint).state, (checkpoint.restore or checkpoint).error
        return ApolloTpError(message) if state == "failed" else None

    async def _write(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        failure: ApolloTpError | None = None
        try:
            found = [each for each in map(self._store.checkpoint, self._snapshots()) if each is not None]
            kept = [Path(each.fallback).name or each.name for each in found]
            is_snapshot = checkpoint.reason == "guard" and not any(each.fallback for each in found)  # there is one
            command = commands.SaveCheckpoint(
                id=self._link.new_id("save"), name=checkpoint.name, kept=kept, snapshot=is_snapshot
            )
            done = await self._ask(command)
            assert isinstance(done, commands.CheckpointDone)
            checkpoint.state, checkpoint.path, checkpoint.num_bytes = "succeeded", done.path, done.num_bytes
            checkpoint.seconds, checkpoint.weight_version = done.seconds, done.weight_version
            checkpoint.stopped_seconds, checkpoint.fallback = done.stopped_seconds, done.fallback
            if done.weight_version == self._link.weight_version and not done.fallback:
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
            place = checkpoint.path or f"a snapshot in host memory ({checkpoint.fallback} if that is lost)"
            message = f"Checkpoint written: {place}" if ok else f"Checkpoint failed: {checkpoint.error}"
            data = {"checkpoint_id": checkpoint.id, "path": checkpoint.path}
            self._store.save_job(job, message, type="checkpoint", level="info" if ok else "warn", data=data)
        self._wake()
        return failure

    async def _put_back(self, checkpoint: Checkpoint) -> ApolloTpError | None:
        restore = checkpoint.restore
        assert restore is not None
        failure: ApolloTpError | None = None
        try:
            command = commands.RestoreCheckpoint(
                id=self._link.new_id("restore"), name=checkpoint.name, restore_id=restore.id,
                fallback=Path(checkpoint.fallback).name,
            )  # fmt: skip
            done = await self._ask(command)
            assert isinstance(done, commands.RestoreDone)
            self._restored(checkpoint, restore, done)
        except RanksGoneError as error:
            log.error("checkpoint %s was not restored, or not to the end: %s", checkpoint.name, error)
            failure = error
        except ApolloTpError as error:
            log.error("checkpoint %s was not restored: %s", checkpoint.name, error)
            failure, restore.state, restore.error = error, "failed", str(error)
            restore.finished_at = time.time()
            self._take_out(checkpoint)
        finally:
            self._current = None
        await self._store.save_checkpoint(checkpoint)
        self._wake()
        return failure

    def _restored(self, checkpoint: Checkpoint, restore: Restore, done: commands.RestoreDone) -> None:
        restore.state, restore.finished_at, restore.weight_version = "succeeded", time.time(), done.weight_version
        restore.seconds, restore.paused_seconds = done.seconds, done.paused_seconds
        restore.lost = bool(checkpoint.fallback and done.path)
        self._take_out(checkpoint)
        if done.weight_version == self._link.weight_version and done.path:
            self._store.set_meta("unsaved", "")
        if (job := self._running()) is not None:
            place = done.path or f"snapshot {checkpoint.name}"
            message = f"Checkpoint restored: {place}; the job goes on from its weights and optimizer state"
            data: dict[str, object] = {"checkpoint_id": checkpoint.id, "path": checkpoint.path, "restored": True}
            self._store.save_job(job, message, type="checkpoint", level="warn", data=data)

    def _interrupted(self, checkpoint: Checkpoint, reason: str) -> None:
        """A process ended before ``checkpoint`` was written, or put back. It stays in the queue unless it is a job's; one to
        be written under another name, since the ranks may have written the old one, or may still be writing it."""
        if checkpoint.state != "queued":
            return
        if checkpoint.reason in ("job", "guard"):
            checkpoint.state, checkpoint.error = "failed", reason
            self._finished(checkpoint)
        else:
            checkpoint.name = _name(checkpoint.name.rpartition("-")[0])

    def _finished(self, checkpoint: Checkpoint) -> None:
        checkpoint.finished_at = time.time()
        self._take_out(checkpoint)
        for listener in self.on_finished:
            listener(checkpoint)

    def _take_out(self, checkpoint: Checkpoint) -> None:
        self._queue.remove(checkpoint)
        self._last[checkpoint.id] = checkpoint
        if len(self._last) > RECENT:
            self._last.popitem(last=False)

    def _snapshots(self) -> list[str]:
        """The checkpoints that jobs may still be rolled back to."""
        return [job.guard.snapshot for job in self._store.active.in_states(*State) if job.guard and job.guard.snapshot]

    def _waiting(self, reason: str) -> Checkpoint | None:
        sent = self._current[0] if self._current else ""
        return next((each for each in self._queue if each.reason == reason and each.id != sent), None)


def _asked_at(checkpoint: Checkpoint) -> float:
    return checkpoint.restore.created_at if checkpoint.restore else checkpoint.created_at


def _name(stamp: str) -> str:
    return f"{stamp}-{secrets.token_hex(3)}"
