"""The start before a server's, the end by SIGTERM, and a server whose API server is killed: one story on the real stack, in
a folder whose name needs quoting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from apollo_tp.launch.compose import quoted
from apollo_tp.shards.instance import processes_of, read_instance
from tests.support.demo_model import make_model, standard_library_text
from tests.support.faults import step
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server
from tests.support.servers import START_SECONDS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CONNECTED_SECONDS = 120.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "grün, (neu)"
    path.mkdir()
    return path


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    path = tmp_path / "rt"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def started() -> Iterator[list[ManagedProcess]]:
    processes: list[ManagedProcess] = []
    yield processes
    for process in processes:
        process.stop()


def _trainer(folder: Path, runtime_dir: Path, port: int, name: str) -> ManagedProcess:
    command = [
        sys.executable, "-m", "apollo_tp.launch.torchrun", "--nproc-per-node", "2", "server.instance=main",
        f"service.http.port={port}", quoted("service.state_dir", f"{folder}/service"),
        quoted("checkpoint.dir", f"{folder}/checkpoints"), "train.threads=1", "train.max_sequence_tokens=256",
        f"server.wait_seconds={START_SECONDS}", "checkpoint.after_idle_seconds=null",
    ]  # fmt: skip
    environment = {"APOLLO_TP_RUNTIME_DIR": str(runtime_dir), "HF_HUB_OFFLINE": "1"}
    return ManagedProcess(command, environment, folder / f"{name}.log")


def _until(holds: Callable[[], object], process: ManagedProcess, seconds: float = CONNECTED_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, process.tail()
        time.sleep(0.25)


def _reason(url: str) -> str:
    try:
        return str(httpx.get(f"{url}/train/status", timeout=5).json()["trainer"].get("reason", ""))
    except httpx.TransportError:
        return ""


def test_a_trainers_life(folder: Path, runtime_dir: Path, started: list[ManagedProcess]) -> None:
    model, port, server_port = folder / "model", free_port(), free_port()
    make_model(model, standard_library_text(200, 30), num_layers=1)
    url, server_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{server_port}"

    # before the server
    trainer = _trainer(folder, runtime_dir, port, "first")
    started.append(trainer)
    _until(lambda: "waiting for server main to start" in _reason(url), trainer)
    server = start_server(model, server_port, runtime_dir, folder / "server.log", instance="main", forking=True)
    started.append(server)
    _until(lambda: "loads its model" in _reason(url) or "loaded the model" in _reason(url), trainer)
    coordinator_url(runtime_dir, trainer, instance="main", seconds=START_SECONDS)
    assert httpx.post(f"{server_url}/train", json=step(wait=True), timeout=240).json()["state"] == "succeeded"

    # the end of a healthy trainer
    assert trainer.stop() == 0, trainer.tail()
    log = trainer.log.read_text()
    assert "Traceback" not in log
    assert "nanobind" not in log
    assert "leaving: got SIGTERM" in log
    answer = httpx.get(f"{server_url}/train/status", timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_trainer")
    assert answer.json()["error"]["message"].startswith("no trainer is running for this server; start one: ")

    # the API server is killed: the workers live on, and training stops at once
    trainer = _trainer(folder, runtime_dir, port, "second")
    started.append(trainer)
    coordinator_url(runtime_dir, trainer, instance="main", seconds=CONNECTED_SECONDS)
    named = processes_of(read_instance(runtime_dir / "main"))
    assert [process.role for process in named] == ["rank 0", "rank 1", "EngineCore", "API server"]
    assert named[-1].pid == server.process.pid
    for process in named[:-1]:  # vLLM's own watch over its parent would end them on most days
        os.kill(process.pid, signal.SIGSTOP)
    os.kill(server.process.pid, signal.SIGKILL)
    assert trainer.process.wait(30) == 3, trainer.tail()
    last = trainer.tail(1)
    assert f"got the end of API server (process {server.process.pid})" in last
    assert "apollo-tp end-orphans" in last

    # a new server does not take the name; a command ends what is left
    command = [sys.executable, "-m", "apollo_tp.cli.main", "end-orphans"]
    environment = os.environ | {"APOLLO_TP_RUNTIME_DIR": str(runtime_dir)}
    refused = subprocess.run(
        command, env=environment, input="n\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 1
    assert all(process.identity.alive() for process in named[:-1])
    done = subprocess.run([*command, "--yes"], env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(str(process) in done.stdout for process in named[:-1])
    assert not any(process.identity.alive() for process in named)
    assert not (runtime_dir / "main" / "rank0.json").exists()
