"""The state folder: its lock, the files in it, how much space they use, and which of them may be removed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from apollo_tp.coordinator.jobs import database
from apollo_tp.coordinator.jobs.reserve import Reserve
from apollo_tp.coordinator.jobs.storage_error import named
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import owned_folder, private_files

log = logging.getLogger(__name__)

PARTS = ("train", "valid", "ref", "batch")
"""Extensions of a job's sample files: training, validation, reference log-probabilities of preference pairs, and
the samples of a reinforcement job's step."""
DATABASE = "jobs.sqlite3"
_SAMPLES = rf"(?:ftjob|job)-[0-9a-f]{{24}}\.(?:{'|'.join(PARTS)})"
OWN_SAMPLES = re.compile(rf"{_SAMPLES}|\.{_SAMPLES}\.[0-9]+")
"""File names below ``samples``: complete files of jobs, and temporary ones (see ``sample_file.write_records``)."""
OWN_FILES = re.compile(r"[0-9a-f]{64}")
"""File names below ``files`` (see ``StateFolder.file_path``)."""


class StateFolder:
    """service.state_dir, locked. Raises ConfigError if it is neither ours nor empty, or if another coordinator has locked it
    for longer than ``lock_seconds``."""

    def __init__(self, folder: Path, lock_seconds: float) -> None:
        owned_folder.claim(folder, "state", "service.state_dir", lambda made: database.is_ours(made / DATABASE))
        self.database = folder / DATABASE
        self.files_dir, self.samples_dir = folder / "files", folder / "samples"
        self.reserve = Reserve(folder)
        self.used_bytes = 0
        self._sizes: dict[Path, int] = {}
        self._counting = threading.Lock()
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                private_files.locked(folder / "coordinator.lock", lambda p: _in_use(folder, p), lock_seconds)
            )
            for each in (self.files_dir, self.samples_dir):
                owned_folder.private_folder(each, "service.state_dir")
                for name in os.listdir(each):
                    self.count(each / name)
            owned_folder.fsync(folder)
            self._lock = stack.pop_all()

    def unlock(self) -> None:
        self._lock.close()

    def open_database(self) -> sqlite3.Connection:
        """The connection that writes. Raises StorageError, and ConfigError (see ``database.open_database``)."""
        is_empty = not (os.listdir(self.files_dir) or os.listdir(self.samples_dir))
        with self._named_errors():
            return database.open_database(self.database, may_be_new=is_empty)

    def connect(self) -> sqlite3.Connection:
        """A further connection. Raises StorageError."""
        with self._named_errors():
            return database.connect(self.database)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise named(error, self.database.parent) from error

    # --- how much space is used --------------------------------------------------------------------------------------

    def count(self, path: Path) -> None:
        """Count a file that was written or removed: looking at 50,000 files for each request would delay all others."""
        try:
            size = path.lstat().st_size
        except FileNotFoundError:
            size = 0
        with self._counting:
            self.used_bytes += size - self._sizes.pop(path, 0)
            if size:
                self._sizes[path] = size

    # --- files ---------------------------------------------------------------------------------------------------------

    def file_path(self, file_id: str) -> Path:
        """Path of a file's content. It is derived from the id, which is ours: no name from a client is part of a path."""
        return self.files_dir / hashlib.sha256(file_id.encode()).hexdigest()

    def remove(self, path: Path, why: str) -> None:
        """Remove a file, if it is one of ours, and count it no more."""
        owned_folder.remove_file(path, why)
        self.count(path)

    def remove_samples(self, job_id: str) -> None:
        """Delete the sample files of a job that is over."""
        for part in PARTS:
            self.remove(self.samples_dir / f"{job_id}.{part}", f"{job_id} is over")

    def remove_orphans(self, samples: set[str], files: set[str]) -> None:
        """Remove all files of ours but these names."""
        for folder, own, known in ((self.samples_dir, OWN_SAMPLES, samples), (self.files_dir, OWN_FILES, files)):
            names = set(os.listdir(folder)) - known
            ours = {name for name in names if own.fullmatch(name)}
            for name in sorted(ours):
                self.remove(folder / name, f"no job or file of {DATABASE} needs it")
            if names - ours:
                log.warning("%s: left alone, since they are not ours: %s", folder, owned_folder.some(names - ours))


def _in_use(folder: Path, holder: str) -> ConfigError:
    return ConfigError(
        f"service.state_dir: got {folder.absolute()}, in which another trainer's coordinator (process {holder}) keeps its "
        "jobs, expected a folder of this one's own; set service.state_dir=..., or stop the other trainer"
    )
