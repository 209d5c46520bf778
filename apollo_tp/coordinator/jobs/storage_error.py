"""What SQLite and the file system report when something cannot be stored or read, named for what it is."""

from __future__ import annotations

import sqlite3
from enum import Enum
from pathlib import Path

from apollo_tp.errors import ApolloTpError
from apollo_tp.runtime.owned_folder import FULL_DISK


class Trouble(Enum):
    """What is wrong: the database is locked by another process, damaged, the disk is full, or reading or writing failed."""

    locked = "storage_locked"
    corrupt = "storage_corrupt"
    full = "storage_full"
    failed = "storage_failed"


ADVICE = {
    Trouble.locked: "end the process that locks it, for example a backup that holds a write transaction",
    Trouble.corrupt: "put back a copy of the database, or set service.state_dir to a new folder",
    Trouble.full: "free space there",
    Trouble.failed: "look at the disk, its limits and its mount options",
}


class StorageError(ApolloTpError):
    """The database or a file in service.state_dir cannot be written or read. ``status`` and ``code`` are for HTTP."""

    def __init__(self, trouble: Trouble, got: str, folder: Path, expected: str = "to use its database") -> None:
        super().__init__(f"service.state_dir {folder}: got {got}, expected {expected}; {ADVICE[trouble]}")
        self.trouble, self.code = trouble, trouble.value
        self.status = 507 if trouble is Trouble.full else 503


_TROUBLES = {
    sqlite3.SQLITE_BUSY: Trouble.locked,
    sqlite3.SQLITE_LOCKED: Trouble.locked,
    sqlite3.SQLITE_FULL: Trouble.full,
    sqlite3.SQLITE_CORRUPT: Trouble.corrupt,
    sqlite3.SQLITE_NOTADB: Trouble.corrupt,
}


def named(error: sqlite3.Error | OSError, folder: Path) -> StorageError:
    """The error as a StorageError."""
    if isinstance(error, OSError):
        trouble = Trouble.full if error.errno in FULL_DISK else Trouble.failed
        return StorageError(trouble, error.strerror or str(error), folder)
    # the low byte is the primary result code; the rest says more precisely what happened
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    trouble = _TROUBLES.get(primary, Trouble.failed)
    return StorageError(
        trouble, f"{error} ({trouble.name}: {getattr(error, 'sqlite_errorname', 'SQLITE_ERROR')})", folder
    )
