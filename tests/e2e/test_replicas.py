"""Two real vLLM servers of one model, trained together by two ranks; one of them is killed in a job, which goes on with the
other one; it returns, and is filled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from tests.support.demo_model import make_model, standard_library_text
from tests.support.faults import served_weights
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer
from tests.support.servers import START_SECONDS, Server, Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPT = [5, 6, 7, 8, 9]
NOTICE_SECONDS = 10.0
NUM_STEPS = 100


class Stack:
    """Processes that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runtime_dir, self.model = folder, folder / "rt", folder / "model"
        self.runtime_dir.mkdir(mode=0o700)
        self.processes: list[ManagedProcess] = []
        make_model(self.model, standard_library_text(200, 30), num_layers=1)

    def serve(self, name: str, *cores: int, extra: Sequence[str] = ()) -> Server:
        """A server at TP = 1, which need not be up yet."""
        port = free_port()
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core % (os.cpu_count() or 1)) for core in cores)}
        log = self.folder / f"{name}-{port}.log"
        process = start_server(
            self.model, port, self.runtime_dir, log, tensor_parallel=1, instance=name, environment=environment,
            extra=extra, forking=True,
        )  # fmt: skip
        self.processes.append(process)
        return Server(f"http://127.0.0.1:{port}", self.model, self.runtime_dir, name, process)

    def start_trainer(self, name: str, *overrides: str, max_restarts: int = 0) -> ManagedProcess:
        """Two ranks beside both servers."""
        overrides += ("server.replicas=2", "optim.lr=1e-3", "train.max_sequence_tokens=256")
        overrides += ("optim.check_replicas_every=1", "checkpoint.after_idle_seconds=null")
        folder = self.folder / "trainer"
        folder.mkdir(exist_ok=True)
        process = start_trainer(
            self.runtime_dir,
            folder,
            folder / f"{name}.log",
            overrides=overrides,
            forking=True,
            max_restarts=max_restarts,
        )
        self.processes.append(process)
        return process

    def train(self, name: str, *overrides: str, first: str = "first", max_restarts: int = 0) -> Trainer:
        """Their coordinator, beside the server ``first``, takes jobs."""
        process = self.start_trainer(name, *overrides, max_restarts=max_restarts)
        url = coordinator_url(self.runtime_dir, process, instance=first, seconds=300)
        return Trainer(url, self.folder / "trainer", process)

    def wait(self, server: Server) -> None:
        server.process.wait_for(f"{server.url}/health", START_SECONDS)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    started = Stack(tmp_path)
    yield started
    for process in reversed(started.processes):
        process.stop()


def _body(seed: int) -> dict:
    samples = [{"context_ids": [5, seed], "continuation_ids": [6 + i, 7, 8, 9]} for i in range(4)]
    return {"samples": samples, "epochs": 4, "wait": True}


def _equal(first: Server, second: Server) -> bool:
    (left,), (right,) = served_weights(first), served_weights(second)
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.05)


def _answer(server: Server, path: str) -> dict:
    """The coordinator's answer on the port of ``server``, or the error while there is no trainer."""
    answer = httpx.get(f"{server.url}{path}", timeout=60).json()
    assert isinstance(answer, dict)
    return answer


class Client(threading.Thread):
    """Asks a server all the time. ``answers`` counts; ``error`` is the first failure."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.answers, self.error, self._over = server, 0, "", threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self.server.logprobs(PROMPT)
                self.answers += 1
            except (httpx.HTTPError, KeyError) as error:
                self.error = self.error or repr(error)
                return

    def end(self) -> None:
        self._over.set()
        self.join(130)


def test_two_servers_stay_identical(stack: Stack) -> None:
    """While clients ask both. One is killed in the middle of a job, which goes on with the other one; it returns with the
    weights on disk, and its port says that it is in step only when it is filled."""
    first, second = stack.serve("first", 0), stack.serve("second", 1)
    stack.wait(first)
    stack.wait(second)
    before = first.logprobs(PROMPT)
    trainer = stack.train("one", "server.min_replicas=1", "server.replica_wait_seconds=1", max_restarts=9)
    clients = [Client(first), Client(second)]
    job = trainer.post("/train", _body(6))
    for client in clients:
        client.end()
    assert [client.error for client in clients] == ["", ""]
    assert min(client.answers for client in clients) > 0
    assert job["state"] == "succeeded", job
    events = trainer.get(f"/train/jobs/{job['id']}/events")["data"]
    losses = [event["data"]["train_loss"] for event in events if event["type"] == "metrics"]
    assert losses[-1] < losses[0]
    assert _equal(first, second)
    assert first.logprobs(PROMPT) == second.logprobs(PROMPT) != before
    status = trainer.get("/train/status")["trainer"]
    assert [replica["instance_id"] for replica in status["replicas"]] == ["first", "second"]
    assert {replica["weight_version"] for replica in status["replicas"]} == {status["weight_version"]}
    assert all(0 <= replica["lag_seconds"] < 5 for replica in status["replicas"])
    assert (status["num_ranks"], status["num_replicas"]) == (2, 2)
    forwarded = httpx.get(f"{second.url}/train/status", timeout=60).raise_for_status()
    assert forwarded.json()["trainer"]["replicas"] == status["replicas"]
    assert forwarded.headers["x-apollo-weight-version"] == str(status["weight_version"])
    shown = subprocess.run(
        [sys.executable, "-m", "apollo_tp.cli.main", "status", "--url", trainer.url],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "2 replicas (first on" in shown

    client = Client(first)
    job = trainer.post("/train", _body(7) | {"epochs": NUM_STEPS, "batch_size": 4, "wait": False})
    _until(lambda: trainer.get(f"/train/jobs/{job['id']}")["step"] >= 2, 60)
    worker = second.manifests[0].process
    os.kill(worker.pid, signal.SIGKILL)
    _until(lambda: not worker.alive(), 60)  # the kernel frees its memory, for which it needs a turn on a busy core
    _until(lambda: "server second: got the end of" in trainer.process.log.read_text(), NOTICE_SECONDS)
    second.process.stop()
    _until(lambda: _answer(first, "/train/status").get("trainer", {}).get("connected"), 120)
    alone = _answer(first, "/train/status")["trainer"]
    assert [replica["instance_id"] for replica in alone["replicas"]] == ["first"]
    assert (alone["num_replicas"], alone["num_ranks"]) == (2, 1)
    _until(lambda: _answer(first, f"/train/jobs/{job['id']}").get("state") == "succeeded", 120)
    events = _answer(first, f"/train/jobs/{job['id']}/events")["data"]
    assert [e["data"]["step"] for e in events if e["type"] == "metrics"] == list(range(1, NUM_STEPS + 1))
    second = stack.serve("second", 1)
    stack.wait(second)
    _until(lambda: httpx.get(f"{second.url}/train/status", timeout=60).status_code == 200, 120)
    assert _equal(first, second)
    client.end()
    assert (client.error, client.answers > 0) == ("", True)
    trained = _answer(first, "/train/status")["trainer"]
    assert trained["weight_version"] == status["weight_version"] + NUM_STEPS
    assert (trained["num_ranks"], len(trained["replicas"])) == (2, 2)
    trainer.process.stop()

    trainer = stack.train("two", "sync=step_lock")
    assert trainer.get("/train/status")["trainer"]["weight_version"] == trained["weight_version"]
    clients = [Client(first), Client(second)]
    job = trainer.post("/train", _body(7))
    for client in clients:
        client.end()
    assert (job["state"], [client.error for client in clients]) == ("succeeded", ["", ""])
    events = trainer.get(f"/train/jobs/{job['id']}/events")["data"]
    assert all(event["data"]["paused_seconds"] > 0 for event in events if event["type"] == "metrics")
    assert _equal(first, second)


def test_engines_of_one_server_are_replicas(stack: Stack) -> None:
    """vLLM tells each engine of a dense model that it is the only one. Each publishes under a name of its own; requests that
    vLLM gives to either get the trained answer. Updates cannot pause them, which is said at the start."""
    server = stack.serve("pair", 0, 1, extra=["--data-parallel-size", "2"])
    stack.wait(server)
    engines = [replace(server, instance=f"pair.{index}") for index in range(2)]
    before = server.logprobs(PROMPT)
    refused = stack.start_trainer("locked", "sync=step_lock")
    assert refused.process.wait(120) != 0
    assert "engines: got 2, expected one, which can be paused; start one server for each" in refused.log.read_text()
    trainer = stack.train("one", first="pair.0")
    assert trainer.post("/train", _body(6))["state"] == "succeeded"
    assert _equal(*engines)
    answers = [server.logprobs(PROMPT) for _ in range(4)]
    assert all(answer == answers[0] != before for answer in answers)
    replicas = _answer(server, "/train/status")["trainer"]["replicas"]
    assert [(replica["instance_id"], replica["host"]) for replica in replicas] == [
        (f"pair.{index}", socket.gethostname()) for index in range(2)
    ]
