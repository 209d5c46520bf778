"""Durable state: jobs, events, uploaded files and checkpoints in SQLite (WAL), and each job's samples in a file of its own.

Nothing is acknowledged to a client before it is stored here. State changes are committed with fsync; per-step progress
survives a crash of any process, and a crash of the machine except for the last seconds. Samples are written once, before the
job's row, under a temporary name; a file without a row is removed at the next start. A folder has one coordinator at a time,
which locks it: a second one would take the running jobs for jobs interrupted by a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from apollo_tp.coordinator.jobs import database
from apollo_tp.coordinator.jobs.job import TERMINAL, Event, Job, State
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.runtime import owned_folder, private_files

log = logging.getLogger(__name__)

PARTS = ("train", "valid", "ref")
"""Extensions of a job's sample files: training, validation, and reference log-probabilities of preference pairs."""
MAX_EVENTS = 1_000_000
"""Beyond this number, the oldest step events of finished jobs are deleted."""
NO_FILTER: dict[str, str] = {}
DATABASE = "jobs.sqlite3"
_SAMPLES = rf"(?:ftjob|job)-[0-9a-f]{{24}}\.(?:{'|'.join(PARTS)})"
OWN_SAMPLES = re.compile(rf"{_SAMPLES}|\.{_SAMPLES}\.[0-9]+")
"""File names below ``samples``: complete files of jobs, and temporary ones (see ``sample_file.write_records``)."""
OWN_FILES = re.compile(r"[0-9a-f]{64}")
"""File names below ``files`` (see ``Store.file_path``)."""


class Checkpoint(msgspec.Struct, kw_only=True):
    """A requested or written checkpoint. ``state`` is queued, succeeded or failed; ``reason`` is request, job or idle."""

    id: str
    name: str
    state: str
    reason: str
    created_at: float
    job_id: str = ""
    step: int = 0
    finished_at: float | None = None
    path: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    weight_version: int | None = None
    metrics: dict[str, float | None] = {}
    error: str = ""


class StoredFile(msgspec.Struct, kw_only=True):
    """An uploaded file. ``filename`` is the client's name for it: it is displayed, and never used as a path."""

    id: str
    filename: str
    bytes: int
    created_at: float
    purpose: str = "fine-tune"
    status: str = "processed"
    expires_at: float | None = None


class Changes:
    """Wakes all requests that wait until something is stored. ``version`` counts the changes."""

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everyone who waits: something was stored."""
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float) -> bool:
        """Wait for the next change. Returns False if there was none within ``seconds``."""
        event = self._event
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True


class Store:
    """The state folder, and the only writer to it. Used from the event loop's thread; each call is a short transaction.

    ``on_change`` is called after every commit that a client may be waiting for. Raises ConfigError if another coordinator
    has locked ``folder`` for longer than ``lock_seconds``, if the folder is neither ours nor empty (see ``owned_folder``),
    or if its database is not one that this version can use.
    """

    def __init__(
        self, folder: Path, on_change: Callable[[], None] = lambda: None, *, lock_seconds: float = 0.0
    ) -> None:
        owned_folder.claim(folder, "state", "service.state_dir", lambda made: database.is_ours(made / DATABASE))
        self.folder = folder
        self.files_dir = folder / "files"
        self.samples_dir = folder / "samples"
        self.on_change = on_change
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                private_files.locked(folder / "coordinator.lock", lambda p: _in_use(folder, p), lock_seconds)
            )
            for each in (self.files_dir, self.samples_dir):
                owned_folder.private_folder(each, "service.state_dir")
            owned_folder.fsync(folder)
            is_empty = not (os.listdir(self.files_dir) or os.listdir(self.samples_dir))
            self._db = database.open_database(folder / DATABASE, may_be_new=is_empty)
            self._lock = stack.pop_all()

    def close(self) -> None:
        """Close the database, which merges the write-ahead log into it, and unlock the folder."""
        self._db.close()
        self._lock.close()

    def checkpoint_wal(self) -> None:
        """Merge the write-ahead log into the database file. Call it on a worker thread: it waits for fsync."""
        with contextlib.closing(sqlite3.connect(self.folder / DATABASE, timeout=10)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def forget_old_steps(self, limit: int = 2000) -> None:
        """Delete step events of finished jobs beyond MAX_EVENTS, the oldest first, at most ``limit``. Call it on a worker
        thread."""
        finished = ",".join(f"'{state.value}'" for state in TERMINAL)
        with contextlib.closing(sqlite3.connect(self.folder / DATABASE, timeout=10)) as connection, connection:
            last = connection.execute("SELECT COALESCE(MAX(id), 0) FROM events").fetchone()[0]
            connection.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE id <= ? AND type = 'metrics'"
                f" AND job_id IN (SELECT id FROM jobs WHERE state IN ({finished})) LIMIT ?)",
                (last - MAX_EVENTS, limit),
            )

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        self.on_change()

    # --- jobs and events -------------------------------------------------------------------------------------------

    def add_job(self, job: Job, *, max_queued: int, idempotency: tuple[str, str, str] | None = None) -> None:
        """Store a new job with its first event. ``idempotency`` is (route, key, digest of the request).

        Raises RequestError 429 if ``max_queued`` jobs are waiting already.
        """
        with self._transaction(durable=True) as db:
            self.check_room(max_queued)
            db.execute(
                "INSERT INTO jobs(id, state, source, data) VALUES (?,?,?,?)",
                (job.id, job.state.value, job.source, msgspec.json.encode(job)),
            )
            if idempotency:
                _add_idempotency(db, idempotency, job.id)
            self._add_event(db, job.id, "info", "state", f"Job {job.state.value}", {"state": job.state.value})

    def check_room(self, max_queued: int) -> None:
        """Raise RequestError 429 if ``max_queued`` jobs are queued or being validated already."""
        counts = self.count_jobs()
        waiting = counts[State.queued] + counts[State.validating_files]
        if waiting >= max_queued:
            raise RequestError(
                f"the queue is full: got {waiting} waiting jobs, expected at most {max_queued}; try again later",
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
    ) -> None:
        """Store the job and, if ``message`` is given, an event, in one transaction; with fsync if ``type`` is "state"."""
        with self._transaction(durable=type == "state") as db:
            db.execute(
                "UPDATE jobs SET state=?, data=? WHERE id=?", (job.state.value, msgspec.json.encode(job), job.id)
            )
            if message:
                details = {"state": job.state.value} if data is None and type == "state" else data or {}
                self._add_event(db, job.id, level, type, message, details)

    def _add_event(
        self, db: sqlite3.Connection, job_id: str, level: str, type: str, message: str, data: dict[str, Any]
    ) -> None:
        db.execute(
            "INSERT INTO events(job_id, time, level, type, message, data) VALUES (?,?,?,?,?,?)",
            (job_id, time.time(), level, type, message, msgspec.json.encode(data)),
        )

    def job(self, job_id: str) -> Job | None:
        """The job of this id, or None."""
        row = self._db.execute("SELECT data FROM jobs WHERE id=?", (job_id,)).fetchone()
        return msgspec.json.decode(row[0], type=Job) if row else None

    def jobs(self, *states: State) -> list[Job]:
        """All jobs in these states, in the order in which they were accepted."""
        marks = ",".join("?" * len(states))
        rows = self._db.execute(
            f"SELECT data FROM jobs WHERE state IN ({marks}) ORDER BY seq", [state.value for state in states]
        )
        return [msgspec.json.decode(row[0], type=Job) for row in rows]

    def page_of_jobs(
        self, *, after: str | None, limit: int, source: str | None = None, metadata: dict[str, str] | None = NO_FILTER
    ) -> tuple[list[Job], bool]:
        """Jobs older than job ``after`` with all of ``metadata`` (None: without any), newest first; and whether there are
        more."""
        rows = self._db.execute(
            "SELECT data FROM jobs WHERE seq < COALESCE((SELECT seq FROM jobs WHERE id=?), 9e18)"
            " AND (? IS NULL OR source=?) ORDER BY seq DESC",
            (after, source, source),
        )
        jobs = (msgspec.json.decode(row[0], type=Job) for row in rows)
        if metadata is None:
            fits = (job for job in jobs if not job.spec.metadata)
        else:
            fits = (job for job in jobs if metadata.items() <= job.spec.metadata.items())
        found = list(islice(fits, limit + 1))
        return found[:limit], len(found) > limit

    def count_jobs(self) -> dict[State, int]:
        """Number of jobs by state."""
        counts = dict(self._db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
        return {state: counts.get(state.value, 0) for state in State}

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of a job with ids above ``after``, oldest first."""
        rows = self._db.execute(
            "SELECT id, job_id, time, level, type, message, data FROM events WHERE job_id=? AND id>? ORDER BY id LIMIT ?",
            (job_id, after, limit),
        )
        return [_event(row) for row in rows]

    def latest_events(self, job_id: str, *, before: int | None, limit: int) -> tuple[list[Event], bool]:
        """Events of a job with ids below ``before``, newest first. Also returns whether there are more."""
        rows = self._db.execute(
            "SELECT id, job_id, time, level, type, message, data FROM events WHERE job_id=? AND id<? "
            "ORDER BY id DESC LIMIT ?",
            (job_id, 2**62 if before is None else before, limit + 1),
        ).fetchall()
        return [_event(row) for row in rows[:limit]], len(rows) > limit

    def repeated(self, route: str, key: str, digest: str) -> str | None:
        """Id of what an earlier request with this Idempotency-Key created, or None. Raises RequestError 422 if that request
        had another body."""
        row = self._db.execute(
            "SELECT digest, target FROM idempotency WHERE route=? AND key=?", (route, key)
        ).fetchone()
        if row is None:
            return None
        if row[0] != digest:
            raise RequestError(
                "Idempotency-Key: got a key that was used with another body, expected a new key",
                field="Idempotency-Key",
                got="a used key with another body",
                expected="a new key, or the same body",
                status=422,
                code="idempotency_mismatch",
            )
        return str(row[1])

    # --- checkpoints, files, single values ---------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: Checkpoint, idempotency: tuple[str, str, str] | None = None) -> None:
        """Insert or update a checkpoint's record."""
        with self._transaction(durable=True) as db:
            if idempotency:
                _add_idempotency(db, idempotency, checkpoint.id)
            db.execute(
                "INSERT INTO checkpoints(id, job_id, state, data) VALUES (?,?,?,?) "
                "ON CONFLICT(id) DO UPDATE SET state=excluded.state, data=excluded.data",
                (checkpoint.id, checkpoint.job_id, checkpoint.state, msgspec.json.encode(checkpoint)),
            )

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        """The checkpoint of this id, or None."""
        row = self._db.execute("SELECT data FROM checkpoints WHERE id=?", (checkpoint_id,)).fetchone()
        return msgspec.json.decode(row[0], type=Checkpoint) if row else None

    def checkpoints(
        self, *, job_id: str | None = None, state: str | None = None, limit: int = 1000
    ) -> list[Checkpoint]:
        """Checkpoints of this job and in this state, newest first; None means any."""
        rows = self._db.execute(
            "SELECT data FROM checkpoints WHERE (? IS NULL OR job_id=?) AND (? IS NULL OR state=?) "
            "ORDER BY seq DESC LIMIT ?",
            (job_id, job_id, state, state, limit),
        )
        return [msgspec.json.decode(row[0], type=Checkpoint) for row in rows]

    def add_file(self, file: StoredFile) -> None:
        """Store the record of an uploaded file. Its content must be at ``file_path(file.id)`` already."""
        with self._transaction(durable=True) as db:
            db.execute("INSERT INTO files(id, data) VALUES (?,?)", (file.id, msgspec.json.encode(file)))

    def file(self, file_id: str) -> StoredFile | None:
        """The file of this id, or None."""
        row = self._db.execute("SELECT data FROM files WHERE id=?", (file_id,)).fetchone()
        return msgspec.json.decode(row[0], type=StoredFile) if row else None

    def files(self) -> list[StoredFile]:
        """All files, newest first."""
        rows = self._db.execute("SELECT data FROM files ORDER BY seq DESC")
        return [msgspec.json.decode(row[0], type=StoredFile) for row in rows]

    def delete_file(self, file_id: str) -> None:
        """Delete the record and the content of an uploaded file."""
        with self._transaction(durable=True) as db:
            db.execute("DELETE FROM files WHERE id=?", (file_id,))
        owned_folder.remove_file(self.file_path(file_id), f"{file_id} is deleted")

    def file_path(self, file_id: str) -> Path:
        """Path of a file's content. It is derived from the id, which is ours: no name from a client is part of a path."""
        return self.files_dir / hashlib.sha256(file_id.encode()).hexdigest()

    def get_meta(self, name: str) -> str:
        """The value stored under ``name``, or "" if there is none."""
        row = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def set_meta(self, name: str, value: str) -> None:
        """Store a value under ``name``. Not flushed to disk at once."""
        with self._transaction(durable=False) as db:
            db.execute(
                "INSERT INTO meta VALUES (?,?) ON CONFLICT(name) DO UPDATE SET value=excluded.value", (name, value)
            )

    def used_bytes(self) -> int:
        """Bytes of all uploaded files and sample files."""
        total = 0
        for folder in (self.files_dir, self.samples_dir):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):  # worker threads rename files when they are complete
                    total += entry.stat().st_size
        return total

    def remove_samples(self, job_id: str) -> None:
        """Delete the sample files of a finished job."""
        for part in PARTS:
            owned_folder.remove_file(self.samples_dir / f"{job_id}.{part}", f"{job_id} is finished")

    def remove_orphans(self) -> None:
        """At start: delete samples of jobs that were never stored or are finished, and contents of files never stored.

        Links, files of other users, and files with names that we do not give are left alone.
        """
        samples = {f"{job.id}.{part}" for job in self.jobs(*set(State) - TERMINAL) for part in PARTS}
        files = {self.file_path(file.id).name for file in self.files()}
        for folder, own, known in ((self.samples_dir, OWN_SAMPLES, samples), (self.files_dir, OWN_FILES, files)):
            names = set(os.listdir(folder)) - known
            ours = {name for name in names if own.fullmatch(name)}
            for name in sorted(ours):
                owned_folder.remove_file(folder / name, f"no job or file of {DATABASE} needs it")
            if names - ours:
                log.warning("%s: left alone, since they are not ours: %s", folder, owned_folder.some(names - ours))


def _in_use(folder: Path, holder: str) -> ConfigError:
    return ConfigError(
        f"service.state_dir: got {folder.absolute()}, in which another trainer's coordinator (process {holder}) keeps its "
        "jobs, expected a folder of this one's own; set service.state_dir=..., or stop the other trainer"
    )


def _event(row: tuple[Any, ...]) -> Event:
    columns = dict(zip(Event.__struct_fields__, row, strict=True))
    return Event(**columns | {"data": msgspec.json.decode(row[-1])})


def _add_idempotency(db: sqlite3.Connection, request: tuple[str, str, str], target: str) -> None:
    columns = "route, key, digest, target, created_at"
    db.execute(f"INSERT INTO idempotency({columns}) VALUES (?,?,?,?,?)", (*request, target, time.time()))
