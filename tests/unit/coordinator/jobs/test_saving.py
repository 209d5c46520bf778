"""Checkpoints that clients, jobs and the idle timer ask for: written one at a time, and never lost silently."""

import asyncio
import contextlib
import time
from types import SimpleNamespace

import pytest

from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.settings import Settings
from apollo_tp.wire import commands
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import CHAT, ONE, ends, saving, tune


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


def test_many_checkpoints_fail_no_job(impatient_stack):
    """Rank 0 works through what it was sent: neither checkpoints nor steps wait for longer than they may. Those that wait
    are one."""
    client, ranks, _ = impatient_stack
    ranks.save_seconds = 0.9
    asked = [client.post("/checkpoint").json()["id"] for _ in range(4)]
    assert len(set(asked)) == 2  # the one that is written, and the one queued after it
    job = client.post("/train", json=ONE | {"epochs": 2}).json()["id"]
    assert ends(client, job)["state"] == "succeeded"
    wait_for(lambda: {c["state"] for c in client.get("/checkpoints").json()["data"]} == {"succeeded"})
    assert [client.get(f"/checkpoint/{identity}").json()["state"] for identity in asked] == ["succeeded"] * 4
    first = client.get("/checkpoints?limit=1").json()
    second = client.get(f"/checkpoints?limit=1&after={first['data'][0]['id']}").json()
    assert [page["has_more"] for page in (first, second)] == [True, False]
    assert [page["data"][0]["id"] for page in (first, second)] == [asked[-1], asked[0]]


def test_the_last_checkpoint_of_a_job_is_not_written_three_times(tmp_path):
    """A coordinator that ends meanwhile: the job asks again for its own."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks, coordinator.client() as client:
            ranks.save_seconds = 1.0
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = tune(client, training_file=CHAT)
            wait_for(lambda: saving(client, job))
            coordinator.kill()
            coordinator.start()
            with coordinator.client() as again:
                assert ends(again, job)["state"] == "succeeded"
                states = [c["state"] for c in again.get("/checkpoints").json()["data"]]
        assert sorted(states) == ["failed", "succeeded"]


def test_a_checkpoint_that_fails_is_said_and_tried_again_now_and_then(tmp_path):
    """The job has succeeded, as its weights are served. The idle checkpoint is tried again after its time, not at once."""
    with chat_stack(tmp_path, settings={"checkpoint_after_idle_seconds": 0.4}) as (client, ranks, _):
        ranks.fail_saves = True
        job = tune(client, training_file=CHAT)
        assert ends(client, job)["state"] == "succeeded"
        events = client.get(f"/train/jobs/{job}/events").json()["data"]
        assert [e["message"] for e in events if e["level"] == "warn"] == [
            "Checkpoint failed: rank 0 raised OSError: no space left"
        ]
        assert client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"] == []
        begun = time.monotonic()
        wait_for(lambda: len(client.get("/checkpoints").json()["data"]) == 4)
        assert time.monotonic() - begun > 0.8  # three of the idle ones, 0.4 s after each other
        assert client.get("/train/status").json()["unsaved"]
        ranks.fail_saves = False
        wait_for(lambda: not client.get("/train/status").json()["unsaved"])


def test_what_is_trained_while_a_checkpoint_is_written_is_not_saved_by_it(stack):
    """A step that is queued after the checkpoint leaves its weights unsaved."""
    client, ranks, _ = stack
    ranks.save_seconds = 0.5
    client.post("/checkpoint")
    job = client.post("/train", json=ONE).json()["id"]
    assert ends(client, job)["state"] == "succeeded"
    wait_for(lambda: client.get("/checkpoints").json()["data"][0]["state"] == "succeeded")
    assert client.get("/train/status").json()["unsaved"]


def test_the_idle_checkpoint_is_written_after_its_time(tmp_path):
    """``after_idle_seconds`` after the last job, without a request."""
    with chat_stack(tmp_path, settings={"checkpoint_after_idle_seconds": 0.3}) as (client, *_):
        job = client.post("/train", json=ONE | {"wait": True}).json()
        wait_for(lambda: [c["state"] for c in client.get("/checkpoints").json()["data"]] == ["succeeded"])
        (checkpoint,) = client.get("/checkpoints").json()["data"]
        assert checkpoint["reason"] == "idle"
        assert checkpoint["created_at"] >= job["finished_at"] + 0.25


def test_the_idle_checkpoint_is_written_once_and_only_after_training(tmp_path):
    """None without a change of the weights, and no second one of the same weights; however long nothing happens."""

    async def main():
        settings = Settings(instance_dir=str(tmp_path), checkpoint_after_idle_seconds=0.0)
        with contextlib.closing(Store(tmp_path / "state")) as store:
            link = SimpleNamespace(weight_version=1, new_id=lambda what: what)
            scheduler = Scheduler(settings, store, link)

            async def written(command):
                return commands.CheckpointDone(id=command.id, path="/c", num_bytes=1, seconds=0.0, weight_version=1)

            scheduler.saver._ask = written
            counts = []
            for unsaved in ("", "1", None, None):
                if unsaved is not None:
                    store.set_meta("unsaved", unsaved)
                for _ in range(3):  # request, send, and nothing more
                    scheduler.wake()
                    await scheduler._work()
                    if scheduler.saver._current:
                        await scheduler.saver._current[1]
                    await store.stored()
                counts.append([checkpoint.state for checkpoint in store.page_of_checkpoints()[0]])
            assert counts == [[], ["succeeded"], ["succeeded"], ["succeeded"]]

    asyncio.run(main())
