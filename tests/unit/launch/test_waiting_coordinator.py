"""The coordinator before its server is ready: one port from the start, which says what is waited for."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from apollo_tp.config import Config, HttpConfig, ServiceConfig
from apollo_tp.errors import ConfigError
from apollo_tp.launch import coordinator_process
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.runtime import instance_folder
from tests.support.manifests import manifest
from tests.support.processes import free_port


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return instance_folder.base_dir(str(tmp_path / "rt"))


def config(tmp_path: Path, port: int) -> Config:
    return Config(service=ServiceConfig(http=HttpConfig(port=port), state_dir=str(tmp_path / "state")))


@pytest.fixture
def coordinator(base: Path, tmp_path: Path) -> Iterator[tuple[CoordinatorProcess, str]]:
    port = free_port()
    process = CoordinatorProcess(config(tmp_path, port), base)
    try:
        url = f"http://127.0.0.1:{port}"
        _until(lambda: _answers(url))
        yield process, url
    finally:
        process.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/train/status").status_code == 200
    except httpx.ConnectError:
        return False


def _until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _reason(url: str) -> str:
    return str(httpx.get(f"{url}/train/status").json()["trainer"].get("reason"))


def test_its_port_says_what_is_waited_for(
    coordinator: tuple[CoordinatorProcess, str], base: Path, tmp_path: Path
) -> None:
    """The status and the page at once; other routes 503 with the reason; the command line finds it; on the same port the
    full service follows, and no connection is refused between them."""
    process, url = coordinator
    process.waiting("server main loads its model")
    _until(lambda: _reason(url) == "server main loads its model")
    page = httpx.get(url)
    assert (page.status_code, "<html" in page.text) == (200, True)
    refused = httpx.post(f"{url}/train", json={"samples": []})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "no_server"
    assert "server main loads its model" in refused.json()["error"]["message"]
    assert httpx.get(f"{url}/train/status", headers={"Host": "evil.example"}).status_code == 403
    environment = {k: v for k, v in os.environ.items() if k != "APOLLO_TP_URL"} | {"APOLLO_TP_RUNTIME_DIR": str(base)}
    command = [sys.executable, "-m", "apollo_tp.cli.main", "status"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "no trainer: server main loads its model" in shown.stdout, shown.stderr
    folder = instance_folder.instance_dir("test", base)
    process.begin(folder, manifest(0, 1, model_path=str(tmp_path / "no model")))
    _until(lambda: httpx.get(f"{url}/train/jobs").status_code == 200)  # raises if a connection is refused
    assert json.loads((folder / "coordinator.json").read_text())["url"] == url
    assert not (base / "coordinator_waiting.json").exists()


def test_one_that_was_killed_waits_again(coordinator: tuple[CoordinatorProcess, str]) -> None:
    process, url = coordinator
    process.waiting("the server")
    process._process.kill()
    process._process.wait()
    process.waiting("the server")
    _until(lambda: _answers(url) and _reason(url) == "the server")


def test_it_ends_with_the_trainer(base: Path, tmp_path: Path) -> None:
    """Its orders end then."""
    process = CoordinatorProcess(config(tmp_path, free_port()), base)
    _until((base / "coordinator_waiting.json").exists)
    assert process._process.stdin is not None
    process._process.stdin.close()
    assert process._process.wait(20) == 0
    assert not (base / "coordinator_waiting.json").exists()


def test_a_port_in_use_is_said_while_the_server_is_waited_for(base: Path, tmp_path: Path) -> None:
    """With the option to change, by rank 0 itself: its message is the last one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = CoordinatorProcess(config(tmp_path, taken.getsockname()[1]), base)
        try:
            process._process.wait(30)
            with pytest.raises(ConfigError, match=r"got exit status 1 .* set service\.http\.port"):
                process.waiting("the server")
        finally:
            process.stop()


def test_what_is_waited_for_is_logged_when_it_changes_and_every_15_seconds(
    coordinator: tuple[CoordinatorProcess, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process, _ = coordinator
    clock = [time.monotonic()]
    monkeypatch.setattr(coordinator_process.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "apollo_tp"):
        for reason, seconds in [("a", 0), ("a", 14.9), ("a", 0.2), ("b", 0.1), ("b", 0.1), ("a", 0.1)]:
            clock[0] += seconds
            process.waiting(reason)
    assert caplog.messages == ["a", "a", "b", "a"]
