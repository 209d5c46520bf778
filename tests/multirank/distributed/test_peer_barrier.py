"""The barrier of sums through peer memory, in Triton's interpreter: two processes over memory that both map."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

MEETINGS = 60


def _start(rank: int, folder: Path, meetings: int) -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.peer_barrier", str(rank), str(folder), str(meetings)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_each_rank_sees_what_the_other_wrote_before_its_barrier(tmp_path: Path) -> None:
    """Every time, whichever comes first, and with one barrier for each of two places that take turns."""
    both = [_start(rank, tmp_path, MEETINGS) for rank in (0, 1)]
    expected = [*(str(number) for number in range(1, MEETINGS + 1)), "1"]
    for process in both:
        assert process.communicate(timeout=120)[0].split() == expected
        assert process.returncode == 0


def test_a_barrier_that_nobody_joins_returns_when_it_is_aborted(tmp_path: Path) -> None:
    process = _start(0, tmp_path, 0)
    assert process.communicate(timeout=120)[0].split() == ["0", "True", "0"], "it says that what follows is wrong"
