"""vLLM's end of the update lock, with a fake engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.locked_server import Plugin


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Plugin]:
    with contextlib.closing(Plugin(tmp_path)) as plugin:
        yield plugin
