"""The folder of tiny checkpoints of every family, made once for all workers of pytest-xdist, beside their first tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support import forks
from tests.support.processes import FORKING_SERVER

SECONDS = 290.0


class CheckpointFolder:
    """``folder`` below ``base``, a folder that all workers share. Nobody but ``trace_cases`` writes into it."""

    def __init__(self, base: Path) -> None:
        self.folder, self._log, self._status = (
            base / "checkpoints",
            base / "checkpoints.log",
            base / "checkpoints.status",
        )
        self._process: forks.Fork | None = None

    def begin(self) -> None:
        """Start to make it, unless another worker has."""
        try:
            self.folder.mkdir()
        except FileExistsError:
            return
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        command = ["tests.support.trace_cases", str(self.folder), str(self._status)]
        self._process = forks.origin(FORKING_SERVER).start(command, dict(os.environ), log, log)
        os.close(log)

    def complete(self) -> Path:
        """The folder, once it is complete."""
        deadline = time.monotonic() + SECONDS
        while not self._status.exists():
            assert self._process is None or self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"checkpoints: got no end of {self._log} within {SECONDS:.0f} s"
            time.sleep(0.1)
        assert self._status.read_text() == "complete", self._log.read_text()
        return self.folder
