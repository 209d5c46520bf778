"""Forked processes are what ``python -m`` would have started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import forks

NAME = "forked_in_a_test"
MODULE = """
import os, sys, time
if __name__ == "__main__":
    sockets = ["socket" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    print(sys.argv[1:], os.environ["GIVEN"], "LEFT" in os.environ, os.getsid(0) == os.getpid(), any(sockets))
    print("loud", file=sys.stderr)
    if sys.argv[1] == "wait":
        time.sleep(60)
    sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1])
"""


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> forks._Origin:
    (tmp_path / f"{NAME}.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("LEFT", "1")
    return forks._Origin(NAME)


def test_arguments_environment_output_and_ends(origin: forks._Origin, tmp_path: Path) -> None:
    """One after the other and at once; a status, a message, a signal; nothing open of the origin."""
    environment = {"GIVEN": "a", "PATH": os.environ["PATH"]}
    with open(tmp_path / "log", "wb") as log:
        waits = origin.start([NAME, "wait"], environment | {"GIVEN": "w"}, log.fileno(), log.fileno())
        ended = [
            origin.start([NAME, end], environment, log.fileno(), log.fileno()).wait(30) for end in ("0", "3", "bad")
        ]
        assert ended == [0, 3, 1]
        with pytest.raises(subprocess.TimeoutExpired):
            waits.wait(0.1)
        assert (waits.poll(), waits.returncode) == (None, None)
        waits.send_signal(signal.SIGTERM)
        assert (waits.wait(30), waits.poll(), waits.returncode) == (-signal.SIGTERM,) * 3
    lines = (tmp_path / "log").read_text().splitlines()
    printed = [f"['{end}'] {'w' if end == 'wait' else 'a'} False True False" for end in ("0", "3", "bad", "wait")]
    assert sorted(line for line in lines if line.startswith("[")) == sorted(printed)
    assert (lines.count("loud"), lines.count("bad")) == (4, 1)


def test_a_module_that_cannot_be_imported_is_an_error() -> None:
    with pytest.raises((RuntimeError, OSError)):
        forks._Origin("no_such_module").start(["no_such_module"], {}, 1, 2)


def test_streams_are_captured_apart(origin: forks._Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "origin", {NAME: origin}.get)
    monkeypatch.setenv("GIVEN", "a")
    done = forks.run(NAME, [NAME, "3"], 30)
    assert (done.returncode, done.stdout, done.stderr) == (3, "['3'] a True True False\n", "loud\n")
