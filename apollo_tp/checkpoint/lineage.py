"""How the served weights have changed since the server loaded them: a small file in the instance's folder.

It outlives the trainer, as the weights do, and is removed with the server's folder. A trainer that starts again reads
from it how often the weights were updated, which step of which job was the last, and where the optimizer state is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from apollo_tp.checkpoint import read_info
from apollo_tp.checkpoint.card import Trained
from apollo_tp.errors import DECODE_ERRORS, ManifestError
from apollo_tp.runtime import private_files

LINEAGE_FILE = "weights.json"
RECORD_BYTES = 16384
"""More than any record needs. The file has this size before weights are written, so that a full disk cannot stop a record
after that."""


class Departure(msgspec.Struct, frozen=True):
    """The last step of a history that a server has had part in."""

    weight_version: int
    last_job_id: str
    last_job_step: int


class Lineage(msgspec.Struct, frozen=True):
    """``checkpoint`` is the last one written of these weights, or the one that the server was started from; ``step_count``
    is the optimizer's, from which the learning rate follows; ``trained`` counts from the first model of them all. ``life``
    is that of the server (``Manifest.life``) with which this history began, where replicas share it; "" is this server's.
    ``partners`` are the lives of all servers that have shared it, with where those left that are away (None: with us).

    ``restoring`` is the checkpoint that is being written into served memory, which has parts of two models until this is ""
    again: the next trainer completes that first. ``restore_id`` names the last request to restore one."""

    weight_version: int = 0
    step_count: int = 0
    checkpoint: str = ""
    last_job_id: str = ""
    last_job_step: int = 0
    trained: Trained = Trained()
    life: str = ""
    restoring: str = ""
    restore_id: str = ""
    partners: dict[str, Departure | None] = {}

    @property
    def here(self) -> Departure:
        """Where this history is now."""
        return Departure(self.weight_version, self.last_job_id, self.last_job_step)


class LineageFile:
    """The record, read by every rank and written by the one with ``keep``. ``trained_here`` is whether a trainer has changed
    the weights since the server loaded them. Raises ManifestError if the file is unreadable."""

    def __init__(self, folder: Path, model_path: str, *, keep: bool) -> None:
        self._path, self._keep = folder / LINEAGE_FILE, keep
        self._file: int | None = None
        self.trained_here = self._path.exists()
        if not self.trained_here:
            source = Path(model_path).resolve()  # `latest` moves on
            info = read_info(source)
            self.record = Lineage()
            if info:
                self.record = Lineage(info.weight_version, checkpoint=str(source), trained=info.trained)
            return
        try:
            self.record = msgspec.json.decode(self._path.read_bytes(), type=Lineage)
        except DECODE_ERRORS as error:
            raise ManifestError(f"{self._path}: got an unreadable record ({error}); restart the server") from None

    def before_write(self) -> None:
        """Record that the weights will differ from the folder that they were loaded from, before they do. Raises OSError if
        the disk has no room for the file."""
        if not self.trained_here or (self._keep and self._file is None):
            self.trained_here = True
            self.update()

    def share(self, life: str, partners: dict[str, Departure | None]) -> None:
        """From now on this is one history with that of other replicas. It is written with the next change, or now if weights
        were changed before."""
        shared = msgspec.structs.replace(self.record, life=life, partners=partners)
        if shared == self.record:
            return
        if self.trained_here:
            self.update(life=life, partners=partners)
        else:
            self.record = shared

    def count_to(self, weight_version: int) -> None:
        """Record the weight version after a step that failed, which may have written weights."""
        if weight_version != self.record.weight_version:
            self.update(weight_version=weight_version)

    def update(self, **changes: Any) -> None:
        """Change fields, and write the record: the first time as a new file that appears complete, then in place."""
        self.record = msgspec.structs.replace(self.record, **changes)
        if not self._keep:
            return
        content = msgspec.json.encode(self.record).ljust(RECORD_BYTES)
        assert len(content) == RECORD_BYTES
        if self._file is None:
            private_files.write_private(self._path, content)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        else:
            os.pwrite(self._file, content, 0)
