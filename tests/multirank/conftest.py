"""Tiny checkpoints of every family with the manifests that real vLLM's loader gives, made once for all workers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.processes import FORKING_SERVER
from tests.support.ranks import start_origins


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody writes into it: workers of pytest-xdist share the folder."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, complete = base / "checkpoints", base / "checkpoints.done"
    start_origins(4)  # the tracing below takes one core for half a minute
    with open(base / "checkpoints.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            folder.mkdir(exist_ok=True)
            done = forks.run(FORKING_SERVER, ["tests.support.trace_cases", str(folder)], 280)
            assert done.returncode == 0, done.stderr
            complete.touch()
    return folder
