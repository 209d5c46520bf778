"""Durable state: jobs, events, uploaded files and checkpoints in SQLite (WAL), and each job's samples in a file of its own.

Nothing is acknowledged to a client before it is stored here. Writes go through a queue with a thread of its own
(``commits.py``); whoever must know that one is stored awaits it, or ``stored``. Until then the newest state of a job that is
not over is in memory, where there is one object of each such job. State changes are committed with fsync; per-step progress
survives a crash of any process except for the last steps, which rank 0 remembers, and a crash of the machine except for the
last seconds.

Samples are written once, before the job's row, under a temporary name; a file without a row is removed at the next start. A
folder has one coordinator at a time, which locks it: a second one would take the running jobs for jobs interrupted by a
crash.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from apollo_tp.coordinator.jobs.active import ActiveJobs
from apollo_tp.coordinator.jobs.commits import LOCKED_SECONDS, Commit, CommitQueue
from apollo_tp.coordinator.jobs.folder import PARTS, StateFolder
from apollo_tp.coordinator.jobs.job import Checkpoint, Event, Job, State, StoredFile
from apollo_tp.coordinator.jobs.reader import Reader
from apollo_tp.errors import RequestError

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_EVENTS = 1_000_000
"""Beyond this number, the oldest step events of finished jobs are deleted."""
RECENT_EVENTS = 256
RECENT_JOBS = 64
"""The last events of the last jobs that had any are kept in memory, for those who follow them."""
CLOSE_SECONDS = 4.0
MAX_BACKLOG = 256
"""The scheduler sends no further step while more writes than this wait."""
Idempotency = tuple[str, str, str]
"""Route, key and digest of the request."""


class Recent:
    """The last events of a job: all of those whose ids are above ``after``."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.events: collections.deque[Event] = collections.deque()

    def add(self, event: Event) -> None:
        self.events.append(event)
        if len(self.events) > RECENT_EVENTS:
            self.after = self.events.popleft().id

    def above(self, event_id: int) -> list[Event]:
        """Those with ids above ``event_id``, oldest first."""
        return list(itertools.takewhile(lambda event: event.id > event_id, reversed(self.events)))[::-1]


class Store(Reader):
    """One coordinator's jobs. Methods that write return a Commit, which can be awaited, or are coroutines. Those of Reader
    see what is stored; ``job``, ``jobs``, ``count_jobs``, ``news`` and ``get_meta`` also what waits.

    ``on_change(job id)`` is called on the event loop after every commit that a client may be waiting for. Raises
    ConfigError if another coordinator has locked ``folder`` for longer than ``lock_seconds``, if the folder is neither ours
    nor empty, or if its database is not one that this version can use; and StorageError.
    """

    def __init__(
        self, folder: Path, on_change: Callable[[str], None] = lambda job_id: None, *, lock_seconds: float = 0.0
    ) -> None:
        self.on_change = on_change
        self._loop = asyncio._get_running_loop()  # None in tests that have none
        self._recent: collections.OrderedDict[str, Recent] = collections.OrderedDict()
        self._adding = 0
        with contextlib.ExitStack() as stack:
            self.disk = StateFolder(folder, lock_seconds)
            stack.callback(self.disk.unlock)
            self._commits = CommitQueue(self.disk.open_database(), self.disk.database, self.disk.reserve)
            stack.callback(self._commits.close, CLOSE_SECONDS)
            super().__init__(self.disk.connect(), folder, self._set_aside)
            stack.callback(self.disconnect)
            self._distant = Reader(self.disk.connect(), folder, self._set_aside)
            stack.callback(self._distant.disconnect)
            self._thread = ThreadPoolExecutor(1, "queries")
            stack.callback(self._thread.shutdown, wait=True, cancel_futures=True)
            stack.callback(self._distant.interrupt)
            self.active = ActiveJobs(self.count_stored_jobs())
            for number, job in self.active_jobs():
                self.active.add(number, job)
            self._meta = self.meta()
            self._close = stack.pop_all()

    def close(self) -> None:
        """Write what waits, close the database, which merges the write-ahead log into it, and unlock the folder."""
        self._close.close()

    @property
    def samples_dir(self) -> Path:
        """The folder of all jobs' samples."""
        return self.disk.samples_dir

    def file_path(self, file_id: str) -> Path:
        """Path of an uploaded file's content."""
        return self.disk.file_path(file_id)

    # --- reads ---------------------------------------------------------------------------------------------------

    async def in_thread(self, query: Callable[[Reader], T]) -> T:
        """Run queries that read many rows, on a thread and a connection of their own."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, query, self._distant)

    def job(self, job_id: str) -> Job | None:
        """The newest state of a job: the object in memory if it is not over. None if there is none of this id."""
        return self.active[job_id] if job_id in self.active else self.stored_job(job_id)

    def shown_job(self, job_id: str) -> Job | None:
        """The job as clients may see it: its end is shown once it is stored."""
        job = self.job(job_id)
        return self.stored_job(job_id) if job is not None and job.terminal else job

    def jobs(self, *states: State) -> list[Job]:
        """All jobs in these states that are not over, in the order in which they were accepted."""
        return list(self.active.in_states(*states))

    def count_jobs(self) -> dict[State, int]:
        """Number of jobs by state."""
        return dict(self.active.counts)

    async def news(self, job_id: str, after: int) -> list[Event]:
        """Events of a job with ids above ``after``, oldest first; mostly from memory. There may be more."""
        recent = self._recent.get(job_id)
        if recent is not None and after >= recent.after:
            return recent.above(after)
        return await self.in_thread(lambda reader: _encoded(reader.events(job_id, after=after, limit=RECENT_EVENTS)))

    def get_meta(self, name: str) -> str:
        """The value stored under ``name``, or "" if there is none."""
        return self._meta.get(name, "")

    # --- writes --------------------------------------------------------------------------------------------------

    async def stored(self) -> None:
        """Wait until everything that was written so far is in the database. Raises StorageError."""
        await self._commits.submit(lambda db: None, durable=True)

    async def room(self) -> None:
        """Wait while the disk is full, or more than MAX_BACKLOG writes wait. Raises StorageError."""
        while self._commits.waits_for_room or self._commits.backlog > MAX_BACKLOG or self.disk.reserve.low:
            if self._commits.failure.done():
                await self._commits.failure
            await asyncio.sleep(0.1)
            if self.disk.reserve.low:
                await self.in_thread(lambda _: self.disk.reserve.keep())

    async def failed(self) -> None:
        """Wait until a write that must not be lost is lost. Raises that StorageError."""
        await self._commits.failure

    async def add_job(self, job: Job, *, max_queued: int, idempotency: Idempotency | None = None) -> str:
        """Store a new job with its first event. Returns its id, or that of the job that the same request made earlier.

        Raises RequestError 429 if ``max_queued`` jobs are waiting already, or 422, and StorageError.
        """
        self.check_room(max_queued)
        columns = (job.id, job.state.value, job.source, msgspec.json.encode(job))
        event = _event(job, "info", "state", f"Job {job.state.value}", {"state": job.state.value})

        def write(db: sqlite3.Connection) -> int:
            if idempotency:
                _add_idempotency(db, idempotency, job.id)
            number = db.execute("INSERT INTO jobs(id, state, source, data) VALUES (?,?,?,?)", columns).lastrowid
            _insert(db, event)
            assert number is not None
            return number

        self._adding += 1
        try:
            number = await self._write(write, event, durable=True, required=False)
        except sqlite3.IntegrityError:  # the same request came twice at once
            if idempotency is None or (known := self.repeated(*idempotency)) is None:
                raise
            return known
        finally:
            self._adding -= 1
        self.active.add(number, job)
        return job.id

    def check_room(self, max_queued: int) -> None:
        """Raise RequestError 429 if ``max_queued`` jobs are queued, paused or being validated already."""
        counts = self.active.counts
        paused = counts[State.paused]
        waiting = counts[State.queued] + counts[State.validating_files] + paused + self._adding
        if waiting >= max_queued:
            advice = f"resume or cancel some of the {paused} paused ones" if paused else "try again later"
            raise RequestError(
                f"the queue is full: got {waiting} waiting jobs, expected at most {max_queued}; {advice}",
                got=str(waiting),
                expected=f"< {max_queued} waiting jobs",
                status=429,
                code="queue_full",
            )

    def save_job(
        self,
        job: Job,
        message: str = "",
        *,
        type: str = "state",
        level: str = "info",
        data: dict[str, Any] | None = None,
    ) -> Commit:
        """Store the job and, if ``message`` is given, an event, in one transaction; with fsync if ``type`` is "state".

        The samples of a job that is over are removed after that.
        """
        self.active.moved(job)
        columns, event = (job.state.value, msgspec.json.encode(job), job.id), None
        if message:
            details = {"state": job.state.value} if data is None and type == "state" else data or {}
            event = _event(job, level, type, message, details)

        def write(db: sqlite3.Connection) -> None:
            db.execute("UPDATE jobs SET state=?, data=? WHERE id=?", columns)
            if event:
                _insert(db, event)

        return self._write(write, event, durable=type == "state", job=job)

    def _write(
        self,
        statements: Callable[[sqlite3.Connection], Any],
        event: Event | None = None,
        *,
        durable: bool,
        required: bool = True,
        job: Job | None = None,
    ) -> Commit:
        if not required:
            self.disk.reserve.check(0)
        commit = self._commits.submit(statements, durable=durable, required=required)
        over = job.id if job is not None and job.terminal else ""
        job_id = event.job_id if event else over

        def after(commit: Future[Any]) -> None:
            if commit.exception() is not None:
                return
            if over:
                self.disk.remove_samples(over)
            if self._loop is None:
                self._committed(job_id, event, over)
                return
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._committed, job_id, event, over)

        commit.add_done_callback(after)
        return commit

    def _committed(self, job_id: str, event: Event | None, over: str) -> None:
        if event is not None and job_id in self.active:
            if job_id not in self._recent:
                self._recent[job_id] = Recent(event.id - 1)
                if len(self._recent) > RECENT_JOBS:
                    self._recent.popitem(last=False)
            self._recent[job_id].add(event)
        if over in self.active:
            self.active.remove(over)
            self._recent.pop(over, None)
        self.on_change(job_id)

    def _set_aside(self, table: str, rowid: int, reason: str) -> None:
        """Move a row that is no record of ours to another table, so that it is in nobody's way. Its files stay."""
        log.error("%s: row %d of %s cannot be read and is set aside: %s", self.disk.database, rowid, table, reason)
        key = "id" if table == "events" else "seq"

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                f"INSERT INTO set_aside(source, id, data, reason, time) SELECT '{table}', id, data, ?, ? FROM {table}"
                f" WHERE {key}=?",
                (reason, time.time(), rowid),
            )
            db.execute(f"DELETE FROM {table} WHERE {key}=?", (rowid,))

        self._commits.submit(write, durable=False)

    # --- checkpoints, files, single values -----------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: Checkpoint) -> Commit:
        """Insert or update a checkpoint's record."""
        return self._write(_checkpoint_statements(checkpoint), durable=True)

    async def add_checkpoint(
        self, checkpoint: Checkpoint, idempotency: Idempotency | None = None, *, required: bool = False
    ) -> str:
        """Store a request for a checkpoint. Returns its id, or that of the checkpoint that the same request made earlier.

        On a full disk a ``required`` one waits for room. Raises StorageError, and RequestError 422.
        """
        statements = _checkpoint_statements(checkpoint)

        def write(db: sqlite3.Connection) -> None:
            if idempotency:
                _add_idempotency(db, idempotency, checkpoint.id)
            statements(db)

        try:
            await self._write(write, durable=True, required=required)
        except sqlite3.IntegrityError:  # the same request came twice at once
            if idempotency is None or (known := self.repeated(*idempotency)) is None:
                raise
            return known
        return checkpoint.id

    def add_file(self, file: StoredFile) -> Commit:
        """Store the record of an uploaded file. Its content must be at ``file_path(file.id)`` already."""
        values = (file.id, msgspec.json.encode(file))
        self.disk.count(self.file_path(file.id))
        return self._write(
            lambda db: db.execute("INSERT INTO files(id, data) VALUES (?,?)", values), durable=True, required=False
        )

    async def delete_file(self, file_id: str) -> None:
        """Delete the record and the content of an uploaded file."""
        await self._write(lambda db: db.execute("DELETE FROM files WHERE id=?", (file_id,)), durable=True)
        await asyncio.to_thread(self.disk.remove, self.file_path(file_id), f"{file_id} is deleted")

    def set_meta(self, name: str, value: str) -> Commit | None:
        """Store a value under ``name``, unless it is there. Not flushed to disk at once."""
        if self._meta.get(name) == value:
            return None
        self._meta[name] = value
        query = "INSERT INTO meta VALUES (?,?) ON CONFLICT(name) DO UPDATE SET value=excluded.value"
        return self._write(lambda db: db.execute(query, (name, value)), durable=False)

    async def forget_old_steps(self, limit: int = 2000) -> None:
        """Delete step events of jobs that are over beyond MAX_EVENTS, the oldest first, at most ``limit``."""
        before = await self.in_thread(Reader.last_event_id) - MAX_EVENTS + 1
        if before > 1 and (ids := await self.in_thread(lambda reader: reader.old_steps(before, limit))):
            marks = ",".join("?" * len(ids))
            await self._write(lambda db: db.execute(f"DELETE FROM events WHERE id IN ({marks})", ids), durable=False)

    def remove_orphans(self) -> None:
        """At start: delete samples of jobs that were never stored or are over, and contents of files never stored.

        Links, files of other users, files with names that we do not give, and what belongs to a row that was set aside
        are left alone.
        """
        self._commits.submit(lambda db: None, durable=True).result(LOCKED_SECONDS)  # rows that are being set aside
        kept = {job.id for job in self.active.in_states(*State)} | self.aside("jobs")
        files = {self.file_path(file_id).name for file_id in self.known_ids("files")}
        self.disk.remove_orphans({f"{job_id}.{part}" for job_id in kept for part in PARTS}, files)


def _event(job: Job, level: str, type: str, message: str, data: dict[str, Any]) -> Event:
    return Event(id=0, job_id=job.id, time=time.time(), level=level, type=type, message=message, data=data)


def _encoded(events: list[Event]) -> list[Event]:
    """The events, encoded here and not on the event loop."""
    for event in events:
        event.encoded  # noqa: B018 - a cached property
    return events


def _insert(db: sqlite3.Connection, event: Event) -> None:
    """Insert an event, and give it its id."""
    columns = (event.job_id, event.time, event.level, event.type, event.message, msgspec.json.encode(event.data))
    number = db.execute(
        "INSERT INTO events(job_id, time, level, type, message, data) VALUES (?,?,?,?,?,?)", columns
    ).lastrowid
    assert number is not None
    event.id = number


def _checkpoint_statements(checkpoint: Checkpoint) -> Callable[[sqlite3.Connection], object]:
    columns = (checkpoint.id, checkpoint.job_id, checkpoint.state, msgspec.json.encode(checkpoint))
    query = (
        "INSERT INTO checkpoints(id, job_id, state, data) VALUES (?,?,?,?) "
        "ON CONFLICT(id) DO UPDATE SET state=excluded.state, data=excluded.data"
    )
    return lambda db: db.execute(query, columns)


def _add_idempotency(db: sqlite3.Connection, request: Idempotency, target: str) -> None:
    columns = "route, key, digest, target, created_at"
    db.execute(f"INSERT INTO idempotency({columns}) VALUES (?,?,?,?,?)", (*request, target, time.time()))
