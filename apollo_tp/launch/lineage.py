"""What has become of the served weights since the server loaded them: a small file in the instance's folder.

It outlives the trainer, as the weights do, and goes with the server. A trainer that starts again learns from it how often
the weights were updated, which step of which job was the last, and where the optimizer state lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from apollo_tp import runtime
from apollo_tp.checkpoint import read_info
from apollo_tp.errors import ManifestError

LINEAGE_FILE = "weights.json"


class Lineage(msgspec.Struct, frozen=True):
    """``checkpoint`` is the last one written of these weights, or the one that the server was started from."""

    weight_version: int = 0
    checkpoint: str = ""
    last_job_id: str = ""
    last_job_step: int = 0


class LineageFile:
    """The record on every rank; the one with ``keep`` writes it. Raises ManifestError if the file is unreadable."""

    def __init__(self, folder: Path, model_path: str, *, keep: bool) -> None:
        self._path, self._keep = folder / LINEAGE_FILE, keep
        self.trained_here = self._path.exists()
        if not self.trained_here:
            info = read_info(Path(model_path))
            self.record = Lineage(info.weight_version, model_path) if info else Lineage()
            return
        try:
            self.record = msgspec.json.decode(self._path.read_bytes(), type=Lineage)
        except msgspec.DecodeError as error:
            raise ManifestError(f"{self._path}: got an unreadable record ({error}); restart the server") from None

    def before_write(self) -> None:
        """The weights are about to differ from the folder that they were loaded from: say so before they do."""
        if not self.trained_here:
            self.trained_here = True
            self.update()

    def count_to(self, weight_version: int) -> None:
        """After a step that failed: it may have written."""
        if weight_version != self.record.weight_version:
            self.update(weight_version=weight_version)

    def update(self, **changes: Any) -> None:
        """Change fields, and write the record."""
        self.record = msgspec.structs.replace(self.record, **changes)
        if self._keep:
            runtime.write_private(self._path, msgspec.json.encode(self.record))
