"""Space on the disk of the state folder: how much is free, and a file that keeps some aside.

A disk that is completely full takes no further record: not that a job was cancelled, nor what a restart has to write. The
file is removed when that happens, and made again once there is room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from apollo_tp.coordinator.jobs.storage_error import StorageError, Trouble
from apollo_tp.runtime import owned_folder

log = logging.getLogger(__name__)

RESERVE = "reserve"
RESERVE_BYTES = 2**20
"""Room for the write-ahead log of some dozen small transactions, and for folding it into the database."""


class Reserve:
    """The file ``reserve`` in the state folder. ``low``: it is missing, since there was no room for twice its size."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / RESERVE
        self.low = False

    def keep(self) -> bool:
        """Make the file if it is missing and there is room. Returns whether it is there."""
        if not self._path.exists():
            self.low = not self._make()
        return not self.low

    def _make(self) -> bool:
        if self.free() < 2 * RESERVE_BYTES:
            return False
        fd = owned_folder.open_own(self._path)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError as error:
            log.warning("%s: no space could be kept aside: %s", self._path, error)
            self._path.unlink()
            return False
        finally:
            os.close(fd)
        return True

    def release(self) -> bool:
        """Remove the file. Returns False if it was not there."""
        self.low = True
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
            log.warning("the disk of %s is full: the space kept aside is used now; free space there", self._folder)
            return True
        return False

    def free(self) -> int:
        """Bytes that are free on the disk."""
        return shutil.disk_usage(self._folder).free

    def check(self, needed: int) -> None:
        """Raise StorageError (507) unless ``needed`` bytes are free, and what is to be kept aside."""
        free = self.free()
        spare = 2 * RESERVE_BYTES if self.low else 0
        if free < needed + spare:
            raise self.full(needed)

    def full(self, needed: int) -> StorageError:
        """The error that says how much is free and how much ``needed`` bytes of data take."""
        expected = f"at least {needed + (2 * RESERVE_BYTES if self.low else 0)} for {needed} bytes of data"
        return StorageError(Trouble.full, f"{self.free()} bytes free", self._folder, expected)
