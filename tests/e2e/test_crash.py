"""kill -9 at random points of jobs on a real stack: vLLM at TP = 2, two ranks, the coordinator.

Whoever is killed, the promises hold: every job ends, each of its steps is reported once and in order, no event that was
seen is gone, the weights were updated once per step, and the server serves all the while.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.processes import ManagedProcess, start_trainer
from tests.support.servers import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

STEPS = 150
MODES = {"hogwild": 20, "step_lock": 16, "drain": 16}
"""Kills for each consistency mode."""
VICTIMS = ("coordinator", "rank 0", "rank 1", "coordinator and rank 0")
OVERRIDES = [
    "server.instance=main",
    "optim.lr=1e-4",
    "train.max_sequence_tokens=256",
    "checkpoint.after_idle_seconds=null",
]
JOB = {"samples": [{"context_ids": [5, 6], "continuation_ids": [7, 8, 9]}], "epochs": STEPS}
"""One step an epoch."""


class Stack:
    """The trainer beside ``server``, started again whenever it is gone, and who is who in it."""

    def __init__(self, server: Server, folder: Path, mode: str) -> None:
        self.server, self.folder, self.mode, self.lives = server, folder, mode, 0
        self.address = server.runtime_dir / "main" / "coordinator.json"
        self.trainer = self._start()

    def _start(self) -> ManagedProcess:
        self.lives += 1
        log = self.folder / f"trainer{self.lives}.log"
        return start_trainer(
            self.server.runtime_dir,
            self.folder,
            log,
            overrides=[*OVERRIDES, f"sync.mode={self.mode}"],
            forking=True,
        )

    def ensure(self) -> None:
        """A trainer that has ended is started again, as a supervisor would."""
        if self.trainer.process.poll() is not None:
            self.trainer.stop()
            self.trainer = self._start()

    def pids(self, victims: str) -> list[int]:
        """Processes to kill; those that are not there, because the trainer is just starting, are left out."""
        ranks = psutil.Process(self.trainer.process.pid).children()
        found = {process.name(): process for process in ranks}  # as forked ranks call themselves
        if "rank 0" in found:
            for child in found["rank 0"].children():
                if "apollo_tp.coordinator" in child.cmdline():
                    found["coordinator"] = child
        return [found[name].pid for name in victims.split(" and ") if name in found]

    def get(self, path: str, seconds: float = 90) -> Any:
        """Ask the coordinator of the moment, through all its lives."""
        deadline = time.monotonic() + seconds
        while True:
            self.ensure()
            try:
                url = json.loads(self.address.read_text())["url"]
                return httpx.get(f"{url}{path}", timeout=10).raise_for_status().json()
            except (httpx.TransportError, FileNotFoundError):
                assert time.monotonic() < deadline, self.trainer.tail()
                time.sleep(0.1)

    def weight_version(self) -> int:
        """Completed updates of the served weights, once rank 0 has said so."""
        deadline = time.monotonic() + 90
        while not (trainer := self.get("/train/status")["trainer"])["connected"]:
            assert time.monotonic() < deadline, self.trainer.tail()
            time.sleep(0.1)
        return trainer["weight_version"]

    def post(self, body: dict[str, Any], key: str, seconds: float = 90) -> dict[str, Any]:
        """Repeat with the same Idempotency-Key until it is acknowledged."""
        deadline = time.monotonic() + seconds
        while True:
            self.ensure()
            try:
                url = json.loads(self.address.read_text())["url"]
                answer = httpx.post(f"{url}/train", json=body, headers={"Idempotency-Key": key}, timeout=10)
                return answer.raise_for_status().json()
            except (httpx.TransportError, FileNotFoundError):
                assert time.monotonic() < deadline, self.trainer.tail()
                time.sleep(0.1)


@pytest.fixture
def stack(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    tmp_path.chmod(0o700)
    stack = Stack(server, tmp_path, request.param)
    yield stack
    stack.trainer.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stack" in metafunc.fixturenames:
        modes = list(MODES) if metafunc.config.getoption("--hostile-long") else ["hogwild"]
        metafunc.parametrize("stack", modes, indirect=True)


def test_kill_nine_at_random_points(server: Server, stack: Stack) -> None:
    """See the top of the file. The points are random in time; the victims take turns."""
    chance = random.Random(0)
    start_version = stack.weight_version()
    jobs = [stack.post(JOB, f"{stack.mode} job {i}")["id"] for i in range(2)]
    seen: dict[str, dict[int, Any]] = {job: {} for job in jobs}
    killed = dict.fromkeys(VICTIMS, 0)
    steps_at_kill = []
    while sum(killed.values()) < MODES[stack.mode]:
        before = sum(stack.get(f"/train/jobs/{job}")["step"] for job in jobs)
        steps_at_kill.append(before)
        time.sleep(chance.uniform(0.0, 1.0))
        for job in jobs:
            seen[job] |= {event["id"]: event for event in stack.get(f"/train/jobs/{job}/events")["data"]}
        victims = min(killed, key=lambda name: (killed[name], name))
        pids = stack.pids(victims)
        if len(pids) < len(victims.split(" and ")):
            continue
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed[victims] += 1
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    assert len(set(steps_at_kill)) > 3, "the kills did not fall into a running job"
    for job in jobs:
        _check(stack, job, seen[job])
    # A step that was interrupted is run again and counted then; one that was counted is never run again.
    assert stack.weight_version() - start_version == 2 * STEPS
    assert all(value > -1e4 for value in server.logprobs([5, 6, 7, 8]))
    again = [stack.post(JOB, f"{stack.mode} job {i}")["id"] for i in range(2)]
    assert again == jobs, "a repeated POST made a job of its own"


def _check(stack: Stack, job: str, seen: dict[int, Any]) -> None:
    deadline = time.monotonic() + 240
    while (state := stack.get(f"/train/jobs/{job}"))["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    assert (state["state"], state["step"]) == ("succeeded", STEPS), state
    events = {event["id"]: event for event in stack.get(f"/train/jobs/{job}/events")["data"]}
    assert {key: events.get(key) for key in seen} == seen, "an event that was seen is gone"
    steps = [event["data"]["step"] for event in events.values() if event["type"] == "metrics"]
    assert steps == sorted(set(steps)), "a step is reported twice or out of order"
