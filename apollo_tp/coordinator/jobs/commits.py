"""Writes to the database, in order, on a thread of their own: neither a lock, a slow disk nor fsync delays the event loop.

Whatever waits when the thread is ready becomes one SQLite transaction, so that many small writes cost one fsync. A database
that is locked is tried again, and so is a full disk; every other error ends the queue.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apollo_tp.coordinator.jobs.database import WAL_BYTES
from apollo_tp.coordinator.jobs.reserve import Reserve
from apollo_tp.coordinator.jobs.storage_error import StorageError, Trouble, named

log = logging.getLogger(__name__)

LOCKED_SECONDS = 60.0
"""For so long a lock of another process is waited for."""
BUSY_SECONDS = 1.0
"""SQLite's own wait for a lock; after it, the log says what is waited for."""
FULL_SECONDS = 1.0
"""The wait before a full disk is tried again."""
Statements = Callable[[sqlite3.Connection], Any]


class Commit(Future[Any]):
    """A write that was submitted. Await it, or call ``result``, to know that it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()  # it cannot be cancelled: others may have been told of it

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()


@dataclass(frozen=True)
class _Write:
    statements: Statements
    durable: bool
    required: bool
    commit: Commit = field(default_factory=Commit)


class CommitQueue:
    """Runs writes on ``db``, the only connection that writes. ``reserve`` is released when the disk is full."""

    def __init__(self, db: sqlite3.Connection, path: Path, reserve: Reserve) -> None:
        self._db, self._path, self._reserve = db, path, reserve
        self._wal = path.with_name(f"{path.name}-wal")
        db.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000:.0f}")
        self._waiting: list[_Write] = []
        self._changed = threading.Condition()
        self._closing = False
        self.waits_for_room = False
        """True while a write that must not be lost finds no room."""
        self.failure = Commit()
        """Fails when a write that must not be lost is lost: what this process knows is ahead of its database."""
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()

    def submit(self, statements: Statements, *, durable: bool, required: bool = True) -> Commit:
        """Queue a write; ``statements`` is called with the connection, on the thread, and its value is the commit's.

        ``durable``: with fsync. A write that is not ``required`` fails on a full disk, instead of waiting for room. Raises
        StorageError, here or from the commit, and from the commit alone sqlite3.IntegrityError.
        """
        write = _Write(statements, durable, required)
        with self._changed:
            if self.failure.done():
                self.failure.result()
            if self.waits_for_room and not required:
                self._reserve.check(0)
            self._waiting.append(write)
            self._changed.notify_all()
        return write.commit

    @property
    def backlog(self) -> int:
        """Number of writes that wait."""
        return len(self._waiting)

    def close(self, seconds: float) -> None:
        """Write what waits, for at most ``seconds``, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.error("%s: %d writes could not be stored within %g s", self._path, self.backlog, seconds)
            self._db.interrupt()
            return
        self._db.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                writes, self._waiting = self._waiting, []
            if not writes:
                return
            try:
                self._store(writes)
                self.fold_wal()
            except StorageError as error:
                self._fail(writes, error)
                return

    def _store(self, writes: list[_Write]) -> None:
        try:
            self._commit(writes, waits=all(write.required for write in writes))
        except StorageError as error:
            if error.trouble is Trouble.full and len(writes) > 1:
                for write in sorted(writes, key=lambda each: each.required):  # those that wait for room come last
                    self._store([write])
                return
            if any(write.required for write in writes) or error.trouble in (Trouble.corrupt, Trouble.failed):
                raise
            for write in writes:
                write.commit.set_exception(error)

    def _commit(self, writes: list[_Write], *, waits: bool) -> None:
        """One transaction of all ``writes``. Raises StorageError; then nothing of them is stored."""
        locked_since: float | None = None
        while True:
            try:
                results = self._attempt(writes)
                break
            except sqlite3.Error as error:
                found = named(error, self._path.parent)
            if found.trouble is Trouble.locked:
                locked_since = locked_since or time.monotonic() - BUSY_SECONDS
                if time.monotonic() - locked_since > LOCKED_SECONDS or self._closing:
                    raise found
                log.warning("%s: locked by another process; trying again", self._path)
            elif found.trouble is Trouble.full and self._reserve.release():
                self._fold()
            elif found.trouble is Trouble.full and waits and not self._closing:
                self._wait_for_room(found)
            else:
                raise found
        self.waits_for_room = False
        for write, result in zip(writes, results, strict=True):
            if isinstance(result, sqlite3.IntegrityError):
                write.commit.set_exception(result)
            else:
                write.commit.set_result(result)

    def _wait_for_room(self, error: StorageError) -> None:
        self._fold()
        if not self.waits_for_room:
            log.error("%s; waiting for room", error)
        self.waits_for_room = True
        with self._changed:
            self._changed.wait_for(lambda: self._closing, FULL_SECONDS)

    def _attempt(self, writes: list[_Write]) -> list[Any]:
        db = self._db
        db.execute(f"PRAGMA synchronous={'FULL' if any(write.durable for write in writes) else 'NORMAL'}")
        db.execute("BEGIN IMMEDIATE")
        try:
            results = [self._savepoint(write) for write in writes]
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # some errors have rolled it back already
                db.execute("ROLLBACK")
            raise
        return results

    def _savepoint(self, write: _Write) -> Any:
        """The value of the write's statements; an IntegrityError, after which the other writes are as they were."""
        self._db.execute("SAVEPOINT one")
        try:
            result = write.statements(self._db)
        except sqlite3.IntegrityError as error:
            self._db.execute("ROLLBACK TO one")
            result = error
        self._db.execute("RELEASE one")
        return result

    def fold_wal(self) -> None:
        """Fold the write-ahead log into the database if it is large. A reader that is in its way delays that."""
        try:
            if self._wal.stat().st_size > WAL_BYTES:
                self._fold()
        except FileNotFoundError:
            pass

    def _fold(self) -> None:
        """Fold and truncate the log, unless another connection reads it or there is no room."""
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            found = named(error, self._path.parent)
            if found.trouble not in (Trouble.locked, Trouble.full):
                raise found from error

    def _fail(self, writes: list[_Write], error: StorageError) -> None:
        with self._changed:
            lost, self._waiting = writes + self._waiting, []
            if any(write.required for write in lost) or not self._closing:
                self.failure.set_exception(error)
        for write in lost:
            if not write.commit.done():
                write.commit.set_exception(error)
