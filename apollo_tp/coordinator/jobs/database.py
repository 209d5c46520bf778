"""The coordinator's SQLite file: recognising our own, and migrating one of an earlier version."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from collections.abc import Sequence
from pathlib import Path

from apollo_tp.errors import ConfigError
from apollo_tp.runtime import owned_folder

log = logging.getLogger(__name__)

APPLICATION_ID = 0x61706F31
"""In the file's header since version 2; `file` and we recognise our databases by it."""
WAL_BYTES = 2**20
"""The write-ahead log is folded into the database, and truncated, when it is larger."""
TABLES = {"jobs", "events", "idempotency", "files", "checkpoints", "meta"}
"""A database of version 1, which has no application id, is recognised by these tables."""
START_SECONDS = 10.0
"""At start, for so long a lock of another process is waited for. CommitQueue waits longer."""
STEPS = (
    """
CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL,
                   source TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX jobs_by_state ON jobs(state, seq);
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, time REAL NOT NULL,
                     level TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX events_by_job ON events(job_id, id);
CREATE TABLE idempotency (key TEXT NOT NULL, route TEXT NOT NULL, digest TEXT NOT NULL, target TEXT NOT NULL,
                          created_at REAL NOT NULL, PRIMARY KEY (route, key));
CREATE TABLE files (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, data BLOB NOT NULL);
CREATE TABLE checkpoints (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job_id TEXT NOT NULL,
                          state TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
""",
    # releases that wrote version 1 also made this index, sooner or later
    "CREATE INDEX IF NOT EXISTS jobs_by_source ON jobs(source, seq);",
    """
CREATE TABLE set_aside (source TEXT NOT NULL, id TEXT, data BLOB, reason TEXT NOT NULL, time REAL NOT NULL);
CREATE INDEX checkpoints_by_job ON checkpoints(job_id, seq);
""",
)
"""Step i migrates version i to version i + 1; a new file takes all steps. Released steps never change: add one."""


def is_ours(path: Path) -> bool:
    """Whether ``path`` is a database that some version of apollo_tp wrote. Changes nothing."""
    try:
        with contextlib.closing(connect(path)) as db:
            return _version(db, path) > 0
    except (ConfigError, FileNotFoundError):
        return False


def open_database(path: Path, *, may_be_new: bool, steps: Sequence[str] = STEPS) -> sqlite3.Connection:
    """Open the database; create it, or migrate it to the version of ``steps``, where necessary.

    With ``may_be_new`` False it must exist already, since there are files that it should know of. Raises ConfigError for a
    missing database, one that is not ours, or one of a later version.
    """
    if may_be_new and not os.path.lexists(path):
        os.close(owned_folder.open_own(path))
        owned_folder.fsync(path.parent)
    try:
        db = connect(path)
    except FileNotFoundError:
        raise _lost(path, "no database") from None
    try:
        version = _version(db, path)
        if version == 0 and not may_be_new:
            raise _lost(path, "an empty database")
        if version > len(steps):
            raise ConfigError(
                f"{path.absolute()}: got schema {version}, expected at most {len(steps)}; a later "
                "version of apollo_tp wrote it: install that version, or set service.state_dir to a new folder"
            )
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA wal_autocheckpoint=0")  # CommitQueue folds the log
        db.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
        if version < len(steps):
            _migrate(db, path, version, steps)
    except BaseException:
        db.close()
        raise
    return db


def _lost(path: Path, got: str) -> ConfigError:
    return ConfigError(
        f"{path.absolute()}: got {got} next to files of jobs, expected the database that they "
        "belong to; put it back, or set service.state_dir to a new folder"
    )


def connect(path: Path) -> sqlite3.Connection:
    """Connect to an existing file. Raises FileNotFoundError, or ConfigError unless it is a regular file of this user."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        raise ConfigError(
            f"{path.absolute()}: got {stat.filemode(info.st_mode)} of user {info.st_uid}, expected a file of user "
            f"{os.geteuid()}; move it away, or set service.state_dir to a new folder"
        )
    uri = f"{path.absolute().as_uri()}?mode=rw"  # a connection may be opened by one thread and used by another
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=START_SECONDS)


def _version(db: sqlite3.Connection, path: Path) -> int:
    """The schema version of our database, 0 if it is empty. Writes nothing. Raises ConfigError if the database is another
    program's, or damaged."""
    try:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        tables = {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type='table'")}
    except sqlite3.OperationalError:  # a full disk, a lock
        raise
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{path.absolute()}: got {error}, expected a database that apollo_tp wrote; put back a copy of it, or set "
            "service.state_dir to a new folder"
        ) from error
    if (version, application, tables) == (0, 0, set()):
        return 0
    if (
        version < 1
        or not tables >= TABLES
        or application not in ((0, APPLICATION_ID) if version == 1 else (APPLICATION_ID,))
    ):
        raise ConfigError(
            f"{path.absolute()}: got another program's database (tables {owned_folder.some(tables)}), expected one "
            "that apollo_tp wrote; set service.state_dir to a new folder"
        )
    return version


def _migrate(db: sqlite3.Connection, path: Path, version: int, steps: Sequence[str]) -> None:
    """Copy the database, then run all missing steps in one transaction. Raises sqlite3.Error; then nothing has changed."""
    if version:
        copy = _back_up(db, path, version)
        log.info("%s: bringing schema %d to %d; %s is a copy from before", path, version, len(steps), copy)
    head = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={len(steps)};"
    try:
        db.executescript(f"BEGIN IMMEDIATE; {' '.join(steps[version:])} {head} COMMIT;")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _back_up(db: sqlite3.Connection, path: Path, version: int) -> Path:
    """Write a complete copy next to the file; it replaces an earlier copy of the same version. Returns its path."""
    final = path.with_name(f"{path.name}.schema{version}")
    partial = path.with_name(f"{final.name}.partial")
    os.close(owned_folder.open_own(partial))
    try:
        with contextlib.closing(sqlite3.connect(partial)) as copy:
            db.backup(copy)
        owned_folder.fsync(partial)
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    owned_folder.fsync(path.parent)
    return final
