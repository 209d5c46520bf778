"""torchrun and mpirun, killed so that they cannot end their ranks: no rank is left over to hold a server's lock."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launchers import LAUNCHERS


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_end_with_a_killed_launcher(launcher: str, tmp_path: Path) -> None:
    """While they wait for a server; when they serve one, SIGTERM ends them in order."""
    command = [*LAUNCHERS[launcher], "-m", "apollo_tp.launch", "server.wait_seconds=100", "command_timeout_seconds=10"]
    environment = os.environ | {"APOLLO_TP_RUNTIME_DIR": str(tmp_path / "rt"), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    ranks: list[int] = []
    try:
        _until(lambda: "looking for a vLLM server" in log.read_text(), 60, log)
        ranks = _ranks(process.pid)
        assert len(ranks) == 2, log.read_text()
        process.kill()
        process.wait(10)
        _until(lambda: not any(map(_lives, ranks)), 20, log)
    finally:
        for pid in (process.pid, *ranks):
            if _lives(pid):
                os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether it has not ended, be it that nobody has asked for its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ranks(parent: int) -> list[int]:
    """Processes below ``parent`` that are trainer ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            above, words = path.joinpath("stat").read_text().rpartition(")")[2].split()[1], path.joinpath("cmdline")
            if int(above) == parent and b"apollo_tp.launch" in words.read_bytes():
                found.append(int(path.name))
        except OSError:  # it has just ended
            continue
    return found


def _until(holds: Callable[[], bool], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
