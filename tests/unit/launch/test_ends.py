"""How a rank and its launcher end: the root cause is the last line, and the status says what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_tp.coordinator.json_logging import JsonFormatter
from apollo_tp.launch.launcher import record_failure

RANK = """
import os, sys, time, types
from apollo_tp.errors import *
from apollo_tp.launch import __main__ as launch

def run(config, on_server_gone):
    rank = int(os.environ.get("RANK", 0))
{body}

sys.modules["apollo_tp.launch.session"] = types.SimpleNamespace(run=run)
launch._exit(launch.main([]))
"""
"""A rank with a session of its own."""


def rank(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "rank.py"
    path.write_text(RANK.format(body="\n".join(f"    {line}" for line in body.splitlines())))
    return [str(path)]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr",
    "127.0.0.1",
    "--nproc-per-node",
    "2",
]


@pytest.mark.parametrize("guilty", [0, 1])
def test_torchruns_report_ends_with_the_first_cause(tmp_path: Path, guilty: int) -> None:
    """Whichever rank it was, and not with that of a rank that failed because of it."""
    body = (
        f"if rank == {guilty}:\n    raise MappingError('tensor x differs')\n"
        f"raise RankFailedError('rank {guilty} failed', rank={guilty}, traceback='')"
    )
    done = start([*TORCHRUN, *rank(tmp_path, body)])
    report = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert report[-2:] == ["traceback : MappingError: tensor x differs", "=" * len(report[-1])]
    assert "Root Cause" in done.stderr


@pytest.mark.parametrize(("error", "status"), [("ServerGoneError('ended')", 3), ("TypeError('odd')", 1)])
def test_a_rank_writes_what_torchrun_reports(tmp_path: Path, error: str, status: int) -> None:
    """A known cause without a traceback, another one with it, in the log as well."""
    file = tmp_path / "error.json"
    done = start([sys.executable, *rank(tmp_path, f"raise {error}")], TORCHELASTIC_ERROR_FILE=str(file))
    recorded = json.loads(file.read_text())["message"]
    assert done.returncode == status
    assert recorded["message"] == error.replace("('", ": ").replace("')", "")
    known = status == 3
    assert ("py_callstack" in recorded["extraInfo"], "Traceback" in done.stderr) == (not known, not known)


def test_without_torchrun_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    record_failure("x")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    record_failure("x")


def test_objects_that_triton_keeps_are_not_reported(tmp_path: Path) -> None:
    """nanobind counts what is left when the interpreter is torn down."""
    body = "from triton._C.libtriton import ir\nimport builtins\nbuiltins.kept = ir.context()"
    done = start([sys.executable, *rank(tmp_path, body)])
    assert (done.returncode, "nanobind" in done.stderr) == (0, False), done.stderr


def test_our_launcher_reports_one_line(tmp_path: Path) -> None:
    """In place of torchrun's tracebacks, with the rank's status."""
    command = [sys.executable, "-m", "apollo_tp.launch.torchrun", "--nproc-per-node", "2", "optim.lr=-1"]
    done = start(command)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "apollo_tp.launch: rank 0 failed: optim.lr: got -1.0, expected a number > 0 and finite"
    )
    assert "Traceback" not in done.stderr
    shown = start([*command[:3], "--help"])
    assert (shown.returncode, "optim.rank=64" in shown.stdout) == (0, True)


@pytest.mark.parametrize(("rank_number", "fields"), [(None, {}), (1, {"rank": 1})])
def test_ranks_and_coordinator_log_in_one_form(rank_number: int | None, fields: dict[str, int]) -> None:
    import logging

    record = logging.LogRecord("apollo_tp", logging.WARNING, "", 0, "%s ü", ("x",), None)
    line = json.loads(JsonFormatter(rank_number).format(record))
    assert line.pop("time") > 0
    assert line == {"level": "warning", "logger": "apollo_tp", "message": "x ü"} | fields
