"""What vLLM's port says while no trainer answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import CLAIMED_VARIABLE
from tests.support.plugin_server import PluginServer

START = "no trainer is running for this server; start one: torchrun "


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(instance_folder.RUNTIME_DIR_VARIABLE, str(tmp_path / "rt"))
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "i")
    monkeypatch.setenv(CLAIMED_VARIABLE, "1")
    return instance_folder.instance_dir("i")


@pytest.fixture
def server(folder: Path) -> Iterator[PluginServer]:
    started = PluginServer()
    try:
        yield started
    finally:
        started.close()


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def message(server: PluginServer) -> str:
    answer = httpx.get(f"{server.url}/train/status", timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_trainer")
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("left", ["nothing", "a socket", "all files"])
def test_no_trainer_is_told_at_once_with_the_command_that_starts_one(
    folder: Path, server: PluginServer, left: str
) -> None:
    """Also after one that was killed: its socket is still there, and no path of ours helps a client."""
    if left != "nothing":
        (folder / instance_folder.COORDINATOR_SOCKET).touch()
    if left == "all files":
        (folder / instance_folder.TRAINER_LOCK).write_text(str(ended_pid()))
        (folder / instance_folder.ADDRESS_FILE).write_text(json.dumps({"url": "http://x", "pid": ended_pid()}))
    started = time.monotonic()
    assert message(server).startswith(START)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("socket", [False, True])
def test_a_trainer_that_starts_is_not_called_missing(folder: Path, server: PluginServer, socket: bool) -> None:
    """It holds the server; its coordinator does not answer yet."""
    (folder / instance_folder.TRAINER_LOCK).write_text(str(os.getpid()))
    if socket:
        (folder / instance_folder.COORDINATOR_SOCKET).touch()
    assert "does not answer yet" in message(server)
