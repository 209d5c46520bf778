"""Faults beside a real server: a rank that raises, a killed trainer, a killed server, and mpirun in place of torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from apollo_tp.errors import ManifestError, NoServerError
from apollo_tp.shards.instance import live_instances, processes_of, read_instance, wait_for_server
from tests.support.faults import (
    OVERRIDES,
    check_kill_in_mid_step,
    check_out_of_memory_on_all_ranks,
    check_raise_in_the_optimizer,
    environment,
    settings,
    start_faulty,
    step,
)
from tests.support.faulty_launch import FAULTY_TOKEN, KILLED_IN_BACKWARD, KILLED_IN_WRITE
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer
from tests.support.servers import START_SECONDS, Server, Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GOOD, FAULTY = step(wait=True), step(FAULTY_TOKEN, wait=True)


@pytest.fixture(scope="class")
def faulty(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A trainer that fails when told to, and survives that; stopped before another is started beside the server."""
    trainer = start_faulty(server, tmp_path_factory.mktemp("faulty"))
    try:
        yield trainer
    finally:
        trainer.process.stop()


class TestFaultsThatTheTrainerSurvives:
    """One trainer for all: what one fault leaves behind is met by the next."""

    def test_a_rank_that_raises_fails_its_job_and_nothing_else(self, server: Server, faulty: Trainer) -> None:
        """The job's events carry that rank's traceback, the other rank does not hang, server and next job go on."""
        assert faulty.post("/train", GOOD)["state"] == "succeeded"
        started = time.monotonic()
        job = faulty.post("/train", FAULTY)
        assert job["state"] == "failed"
        assert time.monotonic() - started < 30
        events = str(faulty.get(f"/train/jobs/{job['id']}/events"))
        assert "injected on rank 1" in events
        assert "faulty_launch.py" in events
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
        for _ in range(2):  # the compute group was formed again, and can fail again
            assert faulty.post("/train", GOOD)["state"] == "succeeded"
            assert faulty.post("/train", FAULTY)["state"] == "failed"

    def test_a_killed_coordinator_is_started_again(self, server: Server, faulty: Trainer) -> None:
        """kill -9 of the coordinator, however young: rank 0 starts another, which knows the jobs and takes new ones."""
        done = faulty.post("/train", GOOD)
        address = server.runtime_dir / "main" / "coordinator.json"
        os.kill(json.loads(address.read_text())["pid"], signal.SIGKILL)
        killed = time.time()
        while address.stat().st_mtime < killed:
            assert time.time() < killed + 30, faulty.process.tail()
            time.sleep(0.2)
        faulty.url = coordinator_url(server.runtime_dir, faulty.process, instance="main", seconds=60)
        assert faulty.get(f"/train/jobs/{done['id']}")["state"] == "succeeded"
        again = faulty.post("/train", GOOD)
        assert again["weight_version"] == done["weight_version"] + 1

    def test_running_out_of_memory_fails_the_job_alone(self, server: Server, faulty: Trainer) -> None:
        check_out_of_memory_on_all_ranks(server, faulty)


@pytest.mark.parametrize("fault", [KILLED_IN_BACKWARD, KILLED_IN_WRITE], ids=["backward", "write"])
def test_a_rank_killed_in_mid_step_leaves_server_and_weights_usable(server: Server, tmp_path: Path, fault: int) -> None:
    """kill -9 of one rank: the trainer ends non-zero, the server keeps serving, the next trainer maps again and trains."""
    check_kill_in_mid_step(server, tmp_path, fault)


def test_a_rank_that_raises_in_its_optimizer_freezes_nothing(server: Server, tmp_path: Path) -> None:
    check_raise_in_the_optimizer(server, tmp_path)


def test_mpirun_joins_the_ranks(server: Server, tmp_path: Path) -> None:
    """`mpirun -n 2 python -m apollo_tp.launch`: rank, size and rendezvous come from MPI."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert mpirun, "the lock file installs openmpi"
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ranks = [mpirun, "-n", "2", "--oversubscribe", sys.executable]
    command = [*ranks, "-m", "apollo_tp.launch", *settings(server, tmp_path)]
    process = ManagedProcess(command, environment(server) | allow, tmp_path / "trainer.log")
    try:
        trainer = Trainer(coordinator_url(server.runtime_dir, process, instance="main"), tmp_path, process)
        assert trainer.get("/train/status")["trainer"]["num_ranks"] == 2
        assert trainer.post("/train", GOOD)["state"] == "succeeded"
    finally:
        process.stop()


def test_wrong_number_of_ranks_is_refused(server: Server, tmp_path: Path) -> None:
    """One rank for a server of two: the error says how many are needed."""
    overrides = [*OVERRIDES, "server.instance=main"]
    process = start_trainer(server.runtime_dir, tmp_path, tmp_path / "t.log", num_ranks=1, overrides=overrides)
    try:
        assert process.process.wait(180) != 0
    finally:
        process.stop()
    assert "--nproc-per-node 2" in process.log.read_text()


def test_a_server_that_cannot_export_serves_and_says_so(server: Server, tmp_path: Path) -> None:
    """A runtime folder that others can read: loud in the server's log and in the trainer's error; requests are answered."""
    open_to_all, port = tmp_path / "open", free_port()
    open_to_all.mkdir(mode=0o755)
    open_to_all.chmod(0o755)
    process = start_server(server.model, port, open_to_all, tmp_path / "server.log", tensor_parallel=1)
    try:
        process.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 2}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        refused = httpx.get(f"http://127.0.0.1:{port}/train/status", timeout=60)
        assert refused.status_code == 503, refused.text
    finally:
        process.stop()
    assert "this server cannot be trained" in process.log.read_text()
    assert str(open_to_all) in process.log.read_text()
    trainer = start_trainer(open_to_all, tmp_path, tmp_path / "trainer.log", num_ranks=1)
    try:
        assert trainer.process.wait(60) != 0
    finally:
        trainer.stop()
    assert str(open_to_all) in trainer.log.read_text()
    assert "chmod 700" in trainer.log.read_text()


def test_a_dead_server_ends_the_trainer_and_is_recognised_as_stale(server: Server, tmp_path: Path) -> None:
    """vLLM killed: the trainer says so within 10 s and exits non-zero; its manifests are stale afterwards."""
    port = free_port()
    victim = start_server(server.model, port, server.runtime_dir, tmp_path / "server.log", instance="victim")
    try:
        overrides = [*OVERRIDES, "server.instance=victim", f"server.wait_seconds={START_SECONDS}"]
        trainer = start_trainer(server.runtime_dir, tmp_path, tmp_path / "trainer.log", overrides=overrides)
        victim.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        coordinator_url(server.runtime_dir, trainer, instance="victim")
        named = {str(process) for process in processes_of(read_instance(server.runtime_dir / "victim"))}
        os.killpg(victim.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert trainer.process.wait(15) != 0
        # torchrun itself needs a moment after the ranks have left
        assert time.monotonic() - killed < 10
        message = r"ServerGoneError: server victim: got the end of (.*?), expected a running vLLM"
        ended = re.findall(message, trainer.log.read_text())
        assert ended, trainer.tail()
        # the kernel ends the killed processes in any order: each rank names those that it finds ended at its first look
        assert {name for found in ended for name in found.split(", ")} <= named
        trainer.stop()
    finally:
        victim.stop()
    assert "victim" in live_instances(server.runtime_dir)[1]
    with pytest.raises((ManifestError, NoServerError), match="stale"):
        wait_for_server(server.runtime_dir, "victim", 1)
