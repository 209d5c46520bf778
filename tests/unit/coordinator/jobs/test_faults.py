"""What may go wrong at a job's end, with its figures, its files or the disk: it is said, nothing acknowledged is lost."""

import math
import resource
import signal

import pytest

from apollo_tp.coordinator.settings import EXIT_STORAGE
from apollo_tp.errors import ConfigError
from apollo_tp.launch import coordinator_process
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import CHAT, ONE, ends, saving, tune

PAIR = (
    b'{"input": {"messages": [{"role": "user", "content": "Hello"}]}, "preferred_output": [{"role": "assistant", "content":'
    b' "fine"}], "non_preferred_output": [{"role": "assistant", "content": "no"}]}\n'
)


@pytest.fixture
def stack(tmp_path):
    with chat_stack(tmp_path, step_seconds=0.05) as parts:
        yield parts


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_validation_loss_that_is_not_finite_is_none(stack, logprob):
    """JSON has no NaN: one that was stored could not be read again, by status, by the jobs' routes, or at a restart."""
    client, ranks, coordinator = stack
    ranks.logprob = logprob
    job = tune(client, training_file=CHAT, validation_file=CHAT)
    assert ends(client, job)["state"] == "succeeded"
    coordinator.kill()
    coordinator.start()
    with coordinator.client() as again:
        assert again.get(f"/train/jobs/{job}").json()["valid_loss"] is None
        for path in ("/train/jobs", "/train/status", "/checkpoints", f"/v1/fine_tuning/jobs/{job}/checkpoints"):
            assert again.get(path).status_code == 200, path


@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_what_is_asked_while_the_last_checkpoint_is_written_holds(stack, action, state):
    """The answer to the request was yes."""
    client, ranks, _ = stack
    ranks.save_seconds = 0.5
    job = tune(client, training_file=CHAT)
    wait_for(lambda: saving(client, job))
    num_steps = len(ranks.applied())
    assert client.post(f"/train/jobs/{job}/{action}").status_code == 200
    assert ends(client, job)["state"] == state
    if action == "pause":
        assert client.post(f"/train/jobs/{job}/resume").status_code == 200
        assert ends(client, job)["state"] == "succeeded"
        assert len(ranks.applied()) == num_steps


@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("pause", "paused")])
@pytest.mark.parametrize("method", ["dpo", "supervised"])
def test_what_is_asked_while_samples_are_scored_holds(stack, action, state, method):
    """A large file is scored for long: for DPO before the first step, and for the validation loss. What was asked takes
    effect behind the batch that is scored now; a job that goes on scores all of them."""
    client, ranks, _ = stack
    num_batches, files = 4, {"training_file": CHAT, "validation_file": CHAT * 32 * 4}
    if method == "dpo":
        files = {"training_file": PAIR * 16 * 4}
    ranks.score_seconds, before = 0.2, len(ranks.applied())
    ranks.scored.clear()
    job = tune(client, method={"type": method, method: {"hyperparameters": {"n_epochs": 1}}}, **files)
    wait_for(lambda: ranks.scored)
    assert client.post(f"/train/jobs/{job}/{action}").status_code == 200
    shown = ends(client, job)
    assert (shown["state"], shown["valid_loss"]) == (state, None)
    assert len(ranks.scored) < num_batches
    assert (len(ranks.applied()) == before) == (method == "dpo")
    if action == "pause":
        ranks.scored.clear()
        ranks.score_seconds = 0.0
        assert client.post(f"/train/jobs/{job}/resume").status_code == 200
        assert ends(client, job)["state"] == "succeeded"
        assert len(ranks.scored) == num_batches


def test_a_trainer_that_dies_as_it_writes_the_last_checkpoint_leaves_the_job_open(tmp_path):
    """A job that succeeded has its checkpoint: the next trainer writes it, and repeats no step."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            ranks.save_seconds = 60.0
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = tune(client, training_file=CHAT)
            wait_for(lambda: saving(client, job))
            num_steps = len(ranks.applied())
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            assert ends(client, job)["state"] == "succeeded"
            assert len(ranks.applied()) == num_steps
        assert "succeeded" in [c["state"] for c in client.get("/checkpoints").json()["data"] if c["job_id"] == job]


def test_jobs_that_are_over_leave_no_samples(stack):
    """Cancelled before they ran, or refused with one file converted: their samples count against the quota."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.5
    running, queued, paused = (client.post("/train", json=ONE).json()["id"] for _ in range(3))
    client.post(f"/train/jobs/{paused}/pause")
    for job in (paused, queued, running):
        assert client.post(f"/train/jobs/{job}/cancel").status_code == 200
        ends(client, job)
    assert ends(client, tune(client, training_file=CHAT, validation_file=b"x"))["state"] == "failed"
    assert list((coordinator.folder / "state" / "samples").iterdir()) == []


def test_a_job_whose_samples_are_gone_fails_alone(stack):
    """It says so, and the next one runs."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.3
    first, second, third = (client.post("/train", json=ONE).json()["id"] for _ in range(3))
    (coordinator.folder / "state" / "samples" / f"{second}.train").unlink()
    assert [ends(client, job)["state"] for job in (first, second, third)] == ["succeeded", "failed", "succeeded"]
    assert "FileNotFoundError" in client.get(f"/train/jobs/{second}").json()["error"]["code"]


def test_a_step_in_flight_counts_when_the_next_one_cannot_be_read(stack):
    """What it wrote is in the weights."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.5
    job = client.post("/train", json=ONE | {"epochs": 9}).json()["id"]
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] == 1)
    (coordinator.folder / "state" / "samples" / f"{job}.train").unlink()
    failed = ends(client, job)
    wait_for(lambda: not client.get("/train/status").json()["trainer"]["busy_with"])
    assert (failed["state"], failed["step"]) == ("failed", len(ranks.applied()))
    assert failed["step"] > 1


def test_a_full_disk_ends_the_coordinator_until_there_is_room(stack):
    """It says why; started again with room, it loses and repeats nothing. A limit on files' size stands for the disk."""
    client, ranks, coordinator = stack
    job = client.post("/train", json=ONE | {"epochs": 20}).json()["id"]
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
    size = (coordinator.folder / "state" / "jobs.sqlite3-wal").stat().st_size
    resource.prlimit(coordinator.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    assert coordinator.process.wait(15) == EXIT_STORAGE
    assert "free space there" in coordinator.log_path.read_text()
    coordinator.start()
    with coordinator.client() as again:
        assert ends(again, job)["state"] == "succeeded"
    assert [step for name, step in ranks.applied() if name == job] == list(range(1, 21))


class Ended:
    """A coordinator that has ended with this status."""

    def __init__(self, status):
        self.poll = lambda: status


@pytest.mark.parametrize(
    ("status", "earlier_life", "age", "outcome"),
    [
        (EXIT_STORAGE, 60.0, 0.5, "waits"),
        (EXIT_STORAGE, 60.0, 6.0, "starts"),
        (EXIT_STORAGE, 0.0, 6.0, "raises"),  # it never could store anything
        (-signal.SIGKILL, 0.0, 0.5, "starts"),
        (1, 60.0, 0.5, "raises"),
    ],
)
def test_when_a_coordinator_is_started_again(monkeypatch, status, earlier_life, age, outcome):
    """After a full disk for as long as it takes; not if it could not have worked."""
    clock, starts = [100.0], []
    monkeypatch.setattr(coordinator_process.time, "monotonic", lambda: clock[0])
    process = object.__new__(coordinator_process.CoordinatorProcess)
    process._has_lived, process._started_at, process._process = False, clock[0], Ended(None)
    monkeypatch.setattr(process, "_start", lambda: starts.append(clock[0]))
    clock[0] += earlier_life
    process.check()
    process._started_at, process._process = clock[0], Ended(status)
    clock[0] += age
    if outcome == "raises":
        with pytest.raises(ConfigError, match=f"exit status {status}"):
            process.check()
    else:
        process.check()
    assert bool(starts) == (outcome == "starts")
