"""Queries of the state's database. Most read few rows by an index; ``Store.in_thread`` is for those that read many."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from apollo_tp.coordinator.jobs.job import TERMINAL, Checkpoint, Event, Job, State, StoredFile
from apollo_tp.coordinator.jobs.storage_error import named
from apollo_tp.errors import RequestError

T = TypeVar("T")
Unreadable = Callable[[str, int, str], None]
NO_FILTER: dict[str, str] = {}
_EVENTS = "SELECT id, id, job_id, time, level, type, message, data FROM events WHERE job_id=?"


def _field(path: str) -> str:
    """SQL for a field of a record; NULL in one that is no JSON, over which the whole query would fail."""
    return f"CASE WHEN json_valid(CAST(data AS TEXT)) THEN json_extract(CAST(data AS TEXT), '{path}') END"


class Reader:
    """Reads over a connection of its own. In WAL mode it never waits for a writer.

    ``on_unreadable(table, rowid, reason)`` is called for a row that is no record of ours; the result lacks it. All methods
    raise StorageError.
    """

    def __init__(self, db: sqlite3.Connection, folder: Path, on_unreadable: Unreadable) -> None:
        self._db, self._folder, self._on_unreadable = db, folder, on_unreadable
        db.execute("PRAGMA query_only=ON")

    def interrupt(self) -> None:
        """End a query that another thread waits for."""
        self._db.interrupt()

    def disconnect(self) -> None:
        self._db.close()

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            cursor = self._db.execute(query, values)
            try:
                yield from cursor
            finally:
                cursor.close()  # an open one would keep the write-ahead log from being folded
        except sqlite3.Error as error:
            raise named(error, self._folder) from error

    def _records(self, type: type[T], table: str, where: str, *values: Any) -> Iterator[T]:
        for rowid, data in self.rows(f"SELECT rowid, data FROM {table} {where}", *values):
            record = self._decoded(type, table, rowid, data)
            if record is not None:
                yield record

    def _decoded(self, type: type[T], table: str, rowid: int, data: Any) -> T | None:
        try:
            return msgspec.json.decode(data, type=type)
        except (msgspec.MsgspecError, TypeError, ValueError) as error:  # TypeError: a number where bytes should be
            self._on_unreadable(table, rowid, str(error))
            return None

    def stored_job(self, job_id: str) -> Job | None:
        """The job of this id as it is stored, or None."""
        return next(self._records(Job, "jobs", "WHERE id=?", job_id), None)

    def active_jobs(self) -> Iterator[tuple[int, Job]]:
        """All jobs that are not over with their numbers, in the order in which they were accepted."""
        over = ",".join(f"'{state.value}'" for state in TERMINAL)
        for number, state, data in self.rows(
            f"SELECT seq, state, data FROM jobs WHERE state NOT IN ({over}) ORDER BY seq"
        ):
            job = self._decoded(Job, "jobs", number, data)
            if job is not None and job.state.value != state:
                self._on_unreadable("jobs", number, f"state {state!r} in its column, {job.state.value!r} in its record")
            elif job is not None:
                yield number, job

    def count_stored_jobs(self) -> dict[State, int]:
        """Number of jobs by state. It grows with all jobs."""
        counts = dict(self.rows("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
        return {state: counts.get(state.value, 0) for state in State}

    def page_of_jobs(
        self, *, after: str | None, limit: int, source: str | None = None, metadata: dict[str, str] | None = NO_FILTER
    ) -> tuple[list[Job], bool]:
        """Jobs older than job ``after`` with all of ``metadata`` (None: without any), newest first; and whether there are
        more. With a filter it may read all jobs.
        """
        where = "WHERE seq < COALESCE((SELECT seq FROM jobs WHERE id=?), 9e18)"
        values: list[Any] = [after]
        if source is not None:
            where, values = f"{where} AND source=?", [*values, source]
        found = []
        for job in self._records(Job, "jobs", f"{where} ORDER BY seq DESC", *values):
            has = job.spec.metadata
            if not has if metadata is None else metadata.items() <= has.items():
                found.append(job)
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def count_tokens(self) -> int:
        """Tokens of all steps of all jobs."""
        text = "CAST(data AS TEXT)"
        rows = self.rows(f"SELECT TOTAL(json_extract({text}, '$.tokens')) FROM jobs WHERE json_valid({text})")
        return int(next(rows)[0])

    def last_event_id(self) -> int:
        """The id of the newest event of any job; 0 if there is none."""
        return int(next(self.rows("SELECT COALESCE(MAX(id), 0) FROM events"))[0])

    def old_steps(self, before: int, limit: int) -> list[int]:
        """Ids below ``before`` of step events of jobs that are over, the oldest first."""
        over = ",".join(f"'{state.value}'" for state in TERMINAL)
        query = (
            "SELECT id FROM events WHERE id < ? AND type = 'metrics'"
            f" AND job_id IN (SELECT id FROM jobs WHERE state IN ({over})) ORDER BY id LIMIT ?"
        )
        return [row[0] for row in self.rows(query, before, limit)]

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of a job with ids above ``after``, oldest first."""
        return self._events("AND id>? ORDER BY id LIMIT ?", job_id, after, limit)[0]

    def page_of_events(self, job_id: str, *, after: int, limit: int) -> tuple[list[Event], bool]:
        """The same, and whether there are more."""
        events, count = self._events("AND id>? ORDER BY id LIMIT ?", job_id, after, limit + 1)
        return events[:limit], count > limit

    def latest_events(self, job_id: str, *, before: int | None, limit: int) -> tuple[list[Event], bool]:
        """Events of a job with ids below ``before``, newest first. Also returns whether there are more."""
        last = 2**62 if before is None else before
        events, count = self._events("AND id<? ORDER BY id DESC LIMIT ?", job_id, last, limit + 1)
        return events[:limit], count > limit

    def _events(self, rest: str, *values: Any) -> tuple[list[Event], int]:
        """The events that can be read, and the number of rows."""
        found, count = [], 0
        for rowid, *columns in self.rows(f"{_EVENTS} {rest}", *values):
            count += 1
            named_columns = dict(zip(Event.__struct_fields__, columns, strict=True))
            data = self._decoded(dict[str, object], "events", rowid, columns[-1])
            if data is not None:
                found.append(Event(**named_columns | {"data": data}))
        return found, count

    def repeated(self, route: str, key: str, digest: str) -> str | None:
        """Id of what an earlier request with this Idempotency-Key created, or None. Raises RequestError 422 if that request
        had another body."""
        row = next(self.rows("SELECT digest, target FROM idempotency WHERE route=? AND key=?", route, key), None)
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

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        """The checkpoint of this id, or None."""
        return next(self._records(Checkpoint, "checkpoints", "WHERE id=?", checkpoint_id), None)

    def checkpoint_named(self, name: str) -> Checkpoint | None:
        """The newest checkpoint of this name, or None."""
        where = f"WHERE {_field('$.name')}=? ORDER BY seq DESC LIMIT 1"
        return next(self._records(Checkpoint, "checkpoints", where, name), None)

    def page_of_checkpoints(
        self, *, after: str | None = None, limit: int = 1000, job_id: str | None = None, state: str | None = None
    ) -> tuple[list[Checkpoint], bool]:
        """Checkpoints of this job and in this state that are older than ``after``, newest first; None means any. Also
        returns whether there are more."""
        where = "WHERE seq < COALESCE((SELECT seq FROM checkpoints WHERE id=?), 9e18)"
        values: list[Any] = [after]
        for column, value in (("job_id", job_id), ("state", state)):
            if value is not None:
                where, values = f"{where} AND {column}=?", [*values, value]
        records = self._records(Checkpoint, "checkpoints", f"{where} ORDER BY seq DESC LIMIT ?", *values, limit + 1)
        found = list(records)
        return found[:limit], len(found) > limit

    def queued_checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that are to be written or put back and are not yet, newest first. Reads all checkpoints."""
        restored = f"{_field('$.restore.state')}='queued'"
        return list(self._records(Checkpoint, "checkpoints", f"WHERE state='queued' OR {restored} ORDER BY seq DESC"))

    def file(self, file_id: str) -> StoredFile | None:
        """The file of this id, or None."""
        return next(self._records(StoredFile, "files", "WHERE id=?", file_id), None)

    def files(self) -> list[StoredFile]:
        """All files, newest first."""
        return list(self._records(StoredFile, "files", "ORDER BY seq DESC"))

    def count_files(self) -> int:
        """Number of files."""
        return int(next(self.rows("SELECT COUNT(*) FROM files"))[0])

    def known_ids(self, table: str) -> set[str]:
        """Ids of all records of a table, and of those of it that were set aside."""
        # not the index: files are removed by this answer, and where the table is damaged there must be none
        return {str(row[0]) for row in self.rows(f"SELECT id FROM {table} NOT INDEXED")} | self.aside(table)

    def aside(self, table: str) -> set[str]:
        """Ids of the records of a table that were set aside."""
        return {str(row[0]) for row in self.rows("SELECT id FROM set_aside WHERE source=?", table)}

    def meta(self) -> dict[str, str]:
        """All single values by name."""
        return dict(self.rows("SELECT name, value FROM meta"))
