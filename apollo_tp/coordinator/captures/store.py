"""Completions that clients let be stored, and feedback on them: a SQLite database of their own in service.state_dir.

Apart from the jobs, since these are other people's words: they are removed by age, number, size, session and id, and what is
removed is overwritten (``secure_delete``). All methods run on one thread, and raise StorageError.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from apollo_tp.config import CaptureConfig
from apollo_tp.coordinator.jobs.storage_error import named
from apollo_tp.wire.capture import Captured

T = TypeVar("T")
DATABASE = "captures.sqlite3"
BUSY_SECONDS = 5.0
DAY = 86_400.0
_TABLES = """
CREATE TABLE IF NOT EXISTS captures (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, session TEXT NOT NULL,
    created REAL NOT NULL, weight_version INTEGER, bytes INTEGER NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS captures_by_session ON captures(session, seq);
CREATE TABLE IF NOT EXISTS feedback (seq INTEGER PRIMARY KEY AUTOINCREMENT,
    capture INTEGER NOT NULL REFERENCES captures(seq) ON DELETE CASCADE, choice INTEGER NOT NULL,
    reward REAL, corrected TEXT, created REAL NOT NULL, batch TEXT NOT NULL DEFAULT '', UNIQUE (capture, choice));
CREATE INDEX IF NOT EXISTS feedback_by_batch ON feedback(batch, seq);
"""


class Stored(msgspec.Struct, frozen=True):
    """A completion as it is stored; ``weight_version`` is that of the served weights when its sampling began."""

    seq: int
    captured: Captured
    weight_version: int | None


class Vote(msgspec.Struct, frozen=True):
    """Feedback on one answer. ``batch`` names what was learned together; "" is not learned yet."""

    seq: int
    capture: int
    choice: int
    reward: float | None
    corrected: str | None
    created: float
    batch: str


class Captures:
    """The database in ``folder``, made if it is missing. Call ``close`` at the end."""

    def __init__(self, folder: Path, config: CaptureConfig) -> None:
        self._config, self._folder = config, folder
        self._thread = ThreadPoolExecutor(1, "captures")
        self._db = self._thread.submit(self._open, folder / DATABASE).result()

    def _open(self, path: Path) -> sqlite3.Connection:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
                db.execute(f"PRAGMA {pragma}")
            db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise named(error, self._folder) from error
        return db

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()

    async def _run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """The result of one transaction."""

        def transaction() -> T:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    result = function(self._db)
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise named(error, self._folder) from error
            return result

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)

    async def add(self, captured: Captured, weight_version: int | None) -> None:
        """Store a completion, and remove what exceeds the limits. One that is stored already stays as it is."""
        data = msgspec.json.encode(captured)

        def add(db: sqlite3.Connection) -> None:
            row = (captured.id, captured.session, captured.created, weight_version, len(data), data)
            db.execute(
                "INSERT OR IGNORE INTO captures(id, session, created, weight_version, bytes, data) VALUES (?,?,?,?,?,?)",
                row,
            )
            self._prune(db)

        await self._run(add)

    async def prune(self) -> None:
        """Remove what has become too old."""
        await self._run(self._prune)

    def _prune(self, db: sqlite3.Connection) -> None:
        config = self._config
        db.execute("DELETE FROM captures WHERE created < ?", (time.time() - config.max_age_days * DAY,))
        count, size = db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM captures").fetchone()
        while count > config.max_count or (size > config.max_bytes and count):
            seq, num_bytes = db.execute("SELECT seq, bytes FROM captures ORDER BY seq LIMIT 1").fetchone()
            db.execute("DELETE FROM captures WHERE seq=?", (seq,))
            count, size = count - 1, size - num_bytes

    async def find(self, identity: str) -> Stored | None:
        """The completion of this id."""
        rows = await self._run(
            lambda db: db.execute("SELECT seq, data, weight_version FROM captures WHERE id=?", (identity,)).fetchall()
        )
        return next(_stored(rows), None)

    async def of_session(self, session: str) -> Stored | None:
        """The newest completion of this session."""
        query = "SELECT seq, data, weight_version FROM captures WHERE session=? ORDER BY seq DESC LIMIT 1"
        return next(_stored(await self._run(lambda db: db.execute(query, (session,)).fetchall())), None)

    async def page(
        self, *, after: int | None, limit: int, newest_first: bool, model: str | None = None
    ) -> tuple[list[Stored], bool]:
        """Completions after the one with the number ``after``, and whether there are more. ``model``: of this one alone."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")

        def page(db: sqlite3.Connection) -> list[Stored]:
            found: list[Stored] = []
            clause, values = (f"WHERE seq {sign} ?", (after,)) if after is not None else ("", ())
            rows = db.execute(f"SELECT seq, data, weight_version FROM captures {clause} ORDER BY seq {order}", values)
            for stored in _stored(rows):
                if model is None or stored.captured.model == model:
                    found.append(stored)
                if len(found) > limit:
                    break
            return found

        found = await self._run(page)
        return found[:limit], len(found) > limit

    async def remove(self, *, identity: str | None = None, session: str | None = None) -> int:
        """Remove a completion, or all of a session, with the feedback on them; returns how many."""
        column, value = ("id", identity) if session is None else ("session", session)
        return await self._run(lambda db: db.execute(f"DELETE FROM captures WHERE {column}=?", (value,)).rowcount)

    # --- feedback ------------------------------------------------------------------------------------------------------

    async def vote(self, capture: int, choice: int, reward: float | None, corrected: str | None) -> bool:
        """Store feedback on an answer. False if there is some already, which stays: one vote per answer."""

        def vote(db: sqlite3.Connection) -> bool:
            row = (capture, choice, reward, corrected, time.time())
            query = "INSERT OR IGNORE INTO feedback(capture, choice, reward, corrected, created) VALUES (?,?,?,?,?)"
            return db.execute(query, row).rowcount == 1

        return await self._run(vote)

    async def waiting(self) -> tuple[int, float | None]:
        """On how many answers there is feedback that is not learned, and since when."""
        query = "SELECT count(*), min(created) FROM feedback WHERE batch=''"
        return await self._run(lambda db: tuple(db.execute(query).fetchone()))

    async def begin_batch(self, name: str, limit: int) -> None:
        """Put the oldest feedback that is not learned into a batch, in the order of its arrival."""
        query = (
            "UPDATE feedback SET batch=? WHERE seq IN (SELECT seq FROM feedback WHERE batch='' ORDER BY seq LIMIT ?)"
        )
        await self._run(lambda db: db.execute(query, (name, limit)))

    async def batch(self, name: str) -> list[tuple[Vote, Stored]]:
        """The feedback of a batch, and the completions."""
        return await self._votes("f.batch=? ORDER BY f.seq", (name,))

    async def learned_before(self, name: str, limit: int) -> list[tuple[Vote, Stored]]:
        """Corrected answers of earlier batches, at random."""
        return await self._votes(
            "f.batch NOT IN ('', ?) AND f.corrected IS NOT NULL ORDER BY random() LIMIT ?", (name, limit)
        )

    async def rewards_before(self, name: str, limit: int) -> list[float]:
        """The last rewards of earlier batches."""
        query = (
            "SELECT reward FROM feedback WHERE batch NOT IN ('', ?) AND reward IS NOT NULL ORDER BY seq DESC LIMIT ?"
        )
        rows = await self._run(lambda db: db.execute(query, (name, limit)).fetchall())
        return [reward for (reward,) in rows]

    async def last_batch(self) -> str:
        """The batch that was begun last; "" before the first."""
        query = "SELECT batch FROM feedback WHERE batch<>'' ORDER BY seq DESC LIMIT 1"
        row = await self._run(lambda db: db.execute(query).fetchone())
        return row[0] if row else ""

    async def _votes(self, clause: str, values: Sequence[Any]) -> list[tuple[Vote, Stored]]:
        query = (
            "SELECT f.seq, f.capture, f.choice, f.reward, f.corrected, f.created, f.batch, c.seq, c.data, c.weight_version "
            f"FROM feedback f JOIN captures c ON c.seq=f.capture WHERE {clause}"
        )
        rows = await self._run(lambda db: db.execute(query, values).fetchall())
        return [(Vote(*row[:7]), next(_stored([row[7:]]))) for row in rows]


def _stored(rows: Any) -> Iterator[Stored]:
    for seq, data, version in rows:
        yield Stored(seq, msgspec.json.decode(data, type=Captured), version)
