"""A host whose servers this process plays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.families import CASES
from tests.support.memory_servers import Host
from tests.support.trainers import CASE


@pytest.fixture
def host(checkpoints: Path, tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "rt").mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        yield Host(tmp_path, checkpoints / CASES[CASE].checkpoint, stack)
