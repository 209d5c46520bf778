"""kill -9 of the coordinator, of rank 0, or of both, at random points of a job: nothing lost, nothing twice.

The fake's journal is what really happened to the weights; a real coordinator and a fake rank 0 run as processes.
"""

import contextlib
import re
import subprocess
import sys

import httpx
import pytest

from apollo_tp.coordinator.jobs.job import State
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ConfigError
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.jobs import ONE, ends
from tests.support.kills import STEPS, VICTIMS, RanksProcess, check_promises, kill_at_a_random_point


@pytest.fixture
def parts(tmp_path):
    coordinator = CoordinatorProcess(tmp_path).start()
    ranks = RanksProcess(coordinator)
    ranks.start()
    try:
        yield coordinator, ranks
    finally:
        ranks.kill()  # first: stopping the coordinator may raise
        coordinator.stop()


# 20 points: each kills one process, or both, somewhere in the job, or even between the POST and its first step
@pytest.mark.parametrize(("who", "seed"), [(who, seed) for seed in range(5) for who in VICTIMS])
def test_kill_nine_at_a_random_point(parts, who, seed):
    """See check_promises; two jobs are queued, and the kill falls anywhere in the first one's life."""
    kill_at_a_random_point(*parts, who, seed)


def test_a_trainer_that_takes_over_before_the_old_one_is_missed(tmp_path):
    """A step that was written but not reported is not run again, though nobody has noticed that its trainer is gone."""
    journal = tmp_path / "journal"
    with CoordinatorProcess(tmp_path, rank_timeout_seconds=20.0) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, journal, step_seconds=0.02) as first:
            job = client.post("/train", json=ONE | {"epochs": 3 * STEPS}).json()["id"]
            wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
            first.mute = True
            before = len(first.applied())
            wait_for(lambda: len(first.applied()) > before + 1)
        with FakeRanks(coordinator.ranks_socket, journal) as second:
            wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "succeeded")
            assert [step for _, step in second.applied()] == list(range(1, 3 * STEPS + 1))


def test_an_acknowledged_job_is_stored(parts):
    """Killed right after the 202: the job is stored, and runs after the restart."""
    coordinator, ranks = parts
    with coordinator.client() as client:
        job = client.post("/train", json=ONE | {"epochs": STEPS}).json()["id"]
        coordinator.kill()
    coordinator.start()
    check_promises(coordinator, ranks, [job], {})


@pytest.mark.parametrize(("action", "state"), [("pause", State.paused), ("cancel", State.cancelled)])
def test_cancel_and_pause_survive_a_kill(tmp_path, action, state):
    """An acknowledged cancel or pause of a running job holds after a kill -9 that came before it took effect."""
    coordinator = CoordinatorProcess(tmp_path)
    with FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=3600.0) as ranks:
        with coordinator, coordinator.client() as client:
            job = client.post("/train", json=ONE).json()["id"]
            wait_for(lambda: ranks.commands)
            assert client.post(f"/train/jobs/{job}/{action}").json()["wanted"] == action
            coordinator.kill()
        with contextlib.closing(Store(tmp_path / "state")) as store:
            stored = store.job(job)
            assert (stored.state, stored.wanted) == (State.running, action)
        with coordinator, coordinator.client() as client:
            assert client.get(f"/train/jobs/{job}").json()["state"] == state.value


def test_on_crash_fail_reports_the_reason(tmp_path):
    """With service.on_crash=fail the interrupted job is failed, with where it stood; the next one runs."""
    coordinator = CoordinatorProcess(tmp_path, on_crash="fail").start()
    with FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.02):
        with coordinator.client() as client:
            job = client.post("/train", json=ONE | {"epochs": 1000}).json()["id"]
            wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
            coordinator.kill()
        with coordinator, coordinator.client() as client:
            failed = client.get(f"/train/jobs/{job}").json()
            assert failed["state"] == "failed"
            assert failed["error"]["code"] == "interrupted"
            assert "after step" in failed["error"]["message"]
            wait_for(lambda: client.get("/health").json()["trainer"])
            assert client.post("/train", json=ONE | {"wait": True}).json()["state"] == "succeeded"


def test_silent_ranks_make_the_job_resumable(tmp_path):
    """No heartbeat for rank_timeout_seconds: status reports it and the job waits; it resumes with the next heartbeats."""
    with (
        CoordinatorProcess(tmp_path) as coordinator,
        coordinator.client() as client,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.02) as ranks,
    ):
        job = client.post("/train", json=ONE | {"epochs": STEPS}).json()["id"]
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
        ranks.mute = True
        status = wait_for(lambda: (s := client.get("/train/status").json())["running"] is None and s)
        assert not status["trainer"]["connected"]
        assert "heartbeat" in status["trainer"]["reason"]
        assert status["queue"][0]["resumable"]
        ranks.mute = False
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "succeeded")
        assert ranks.applied() == [(job, step) for step in range(1, STEPS + 1)]


def test_a_restarted_server_does_not_get_the_second_half_of_a_job(tmp_path):
    """The weights of the first steps were lost with the server: the job fails with this reason, and does not resume."""
    with CoordinatorProcess(tmp_path) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.02):
            job = client.post("/train", json=ONE | {"epochs": STEPS}).json()["id"]
            wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal2", instance_id="another"):
            failed = wait_for(lambda: (j := client.get(f"/train/jobs/{job}").json())["state"] == "failed" and j)
            assert failed["error"]["code"] == "server_restarted"
            assert client.post("/train", json=ONE | {"wait": True}).json()["state"] == "succeeded"


def test_steps_that_are_counted_after_a_crash_are_saved(tmp_path):
    """A job whose only reply was lost: the idle checkpoint is written all the same."""
    settings = {"checkpoint_after_idle_seconds": 0.3}
    with (
        CoordinatorProcess(tmp_path, settings=settings, rank_timeout_seconds=30.0) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=1.0) as ranks,
    ):
        with coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = client.post("/train", json=ONE).json()["id"]
            wait_for(lambda: ranks.commands)
        coordinator.kill()
        wait_for(lambda: ranks.commands[0].id in ranks.answered, what="the reply that nobody receives")
        coordinator.start()
        with coordinator.client() as client:
            assert ends(client, job)["weight_version"] == 1
            wait_for(lambda: client.get("/checkpoints").json()["data"])
        assert len(ranks.applied()) == 1


def test_no_step_is_run_twice_after_many_questions(tmp_path):
    """A coordinator that starts while rank 0 is busy asks who it is again and again, and all of it is answered at once."""
    with (
        CoordinatorProcess(tmp_path, rank_timeout_seconds=0.3) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.05) as ranks,
    ):
        ranks.save_seconds, ranks.hello_seconds = 3.0, 0.01
        with coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            client.post("/checkpoint")
            wait_for(lambda: ranks.commands)
        coordinator.kill()
        coordinator.start()
        ranks.save_seconds = 0.0
        with coordinator.client() as client:
            job = client.post("/train", json=ONE | {"epochs": 4}).json()["id"]
            assert ends(client, job)["state"] == "succeeded"
        assert [step for _, step in ranks.applied()] == [1, 2, 3, 4]


def test_a_server_that_starts_again_under_its_name_is_another(tmp_path):
    """Half a job was trained into weights that are gone."""
    with CoordinatorProcess(tmp_path) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.1) as ranks:
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = client.post("/train", json=ONE | {"epochs": 50}).json()["id"]
            wait_for(lambda: len(ranks.applied()) > 3)
        wait_for(lambda: not client.get("/health").json()["trainer"])
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal2") as ranks:
            ranks.server_life = "fake@2"
            assert ends(client, job)["error"]["code"] == "server_restarted"
            assert ranks.applied() == []


def test_a_second_coordinator_leaves_the_first_ones_jobs_alone(parts):
    """Two trainers started from one folder: the second is refused before it touches a job; a killed one leaves no lock."""
    coordinator, _ = parts
    folder = coordinator.folder / "state"
    refusal = rf"{re.escape(str(folder))}.*process {coordinator.process.pid}\).*service\.state_dir=\.\.\."
    with coordinator.client() as client:
        job = client.post("/train", json=ONE | {"epochs": STEPS}).json()["id"]
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
        with pytest.raises(ConfigError, match=refusal):
            Store(folder)
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "succeeded")
    coordinator.kill()
    Store(folder).close()
    Store(folder).close()


def test_the_coordinator_ends_with_its_parent(tmp_path):
    """Its parent gone, the coordinator exits by itself: no orphan keeps the port."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        coordinator = CoordinatorProcess(tmp_path, settings={"parent_pid": parent.pid}).start()
        # our process, not ``parent``, started it: to the coordinator its parent is gone already
        assert coordinator.process.wait(10) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{coordinator.url}/health")
        parent.communicate(b"\n")
