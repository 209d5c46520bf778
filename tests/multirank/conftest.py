"""Tiny checkpoints of every family with the manifests that real vLLM's loader gives, made once per session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import start_origins


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    start_origins(4)  # the tracing below takes one core for half a minute
    subprocess.run([sys.executable, "-m", "tests.support.trace_cases", str(folder)], check=True, timeout=240)
    return folder
