"""What is stored and for how long: samples, events, the queue's length, the disk quota, a full disk."""

import asyncio
import contextlib
import functools
import resource
import sqlite3
import time

import pytest

from apollo_tp.coordinator.jobs.job import TERMINAL, Checkpoint, JobSpec, State, StoredFile, new_job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.settings import EXIT_STORAGE
from apollo_tp.errors import RequestError
from tests.support.fakes import CoordinatorProcess, wait_for
from tests.support.jobs import CHAT, ONE, ends, tune


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


def test_a_disk_that_cannot_be_written_ends_the_coordinator(stack):
    """It logs why; started again, it loses and repeats nothing. A limit on file sizes makes writing fail."""
    client, ranks, coordinator = stack
    job = client.post("/train", json=ONE | {"epochs": 20}).json()["id"]
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] > 2)
    size = (coordinator.folder / "state" / "jobs.sqlite3-wal").stat().st_size
    resource.prlimit(coordinator.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    assert coordinator.process.wait(15) == EXIT_STORAGE
    assert "disk I/O error" in coordinator.log_path.read_text()
    coordinator.start()
    with coordinator.client() as again:
        assert ends(again, job)["state"] == "succeeded"
    assert [step for name, step in ranks.applied() if name == job] == list(range(1, 21))


def test_the_oldest_steps_of_jobs_that_are_over_are_forgotten(tmp_path, monkeypatch):
    """Else the database of a service that trains for months would fill the disk. What else happened stays."""
    monkeypatch.setattr("apollo_tp.coordinator.jobs.store.MAX_EVENTS", 20)
    asyncio.run(forgetting(tmp_path))


async def forgetting(folder):
    store = Store(folder)
    over, running = new_job("train", JobSpec(), State.running), new_job("train", JobSpec(), State.running)
    for job in (over, running):
        await store.add_job(job, max_queued=9)
    for step in range(30):
        for job in (over, running):
            store.save_job(job, f"Step {step}", type="metrics")
    over.state = State.succeeded
    store.save_job(over, "over")
    await store.stored()
    await store.forget_old_steps()
    assert [event.message for event in store.events(over.id)] == [
        "Job running",
        *(f"Step {step}" for step in range(21, 30)),
        "over",
    ]
    assert len(store.events(running.id)) == 31
    store.close()


@pytest.mark.parametrize("state", sorted(set(State) - TERMINAL, key=str))
def test_jobs_that_wait_fill_the_queue(tmp_path, state):
    """Those whose files are being validated, and paused ones, too: else any number could be stored."""

    async def main():
        with contextlib.closing(Store(tmp_path)) as store:
            for _ in range(2):
                await store.add_job(new_job("openai", JobSpec(), state), max_queued=2)
            if state is State.running:
                await store.add_job(new_job("train", JobSpec(), State.queued), max_queued=2)
                return
            with pytest.raises(RequestError, match="got 2 waiting jobs, expected at most 2") as error:
                await store.add_job(new_job("train", JobSpec(), State.queued), max_queued=2)
            assert (error.value.status, error.value.code) == (429, "queue_full")
            assert ("resume or cancel some of the 2 paused" in str(error.value)) == (state is State.paused)

    asyncio.run(main())


def test_a_retry_is_answered_although_the_queue_is_full(tmp_path):
    """Else a client whose connection broke takes its job for refused, posts it under another key, and trains it twice."""
    with CoordinatorProcess(tmp_path, max_queued_jobs=1) as coordinator, coordinator.client() as client:
        key = {"Idempotency-Key": "once"}
        first = client.post("/train", json=ONE, headers=key)
        assert first.status_code == 202
        assert client.post("/train", json=ONE).status_code == 429
        again = client.post("/train", json=ONE, headers=key)
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        assert again.headers["Idempotent-Replay"] == "true"


def test_the_disk_quota_is_of_all_files_together(tmp_path):
    """Uploads and samples; room is there again once a file is deleted."""

    def upload(size):
        part = {"file": ("a.jsonl", b"x" * size)}
        return client.post("/v1/files", files=part, data={"purpose": "fine-tune"})

    with CoordinatorProcess(tmp_path, max_state_bytes=1000) as coordinator, coordinator.client() as client:
        first = upload(600)
        assert first.status_code == 200
        for size in (600, 401):
            refused = upload(size)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "disk_quota")
        assert client.delete(f"/v1/files/{first.json()['id']}").status_code == 200
        assert upload(600).status_code == 200
        padded = {"text": "x" * 500}
        refused = client.post("/train", json=padded)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "disk_quota")


def traced(statements, connect, *arguments, **options):
    """A connection that notes its statements."""
    connection = connect(*arguments, **options)
    connection.set_trace_callback(statements.append)
    return connection


def test_what_is_acknowledged_is_flushed_to_disk(tmp_path, monkeypatch):
    """Jobs, what clients asked of them, checkpoints and files; not the figures of each step, which are too many for it."""
    statements, job, now = [], new_job("train", JobSpec(), State.queued), time.time()
    file = StoredFile(id="f", filename="f", bytes=1, created_at=now)
    checkpoint = Checkpoint(id="c", name="c", state="queued", reason="request", created_at=now)
    actions = {
        "job": lambda store: store.add_job(job, max_queued=9),
        "state": lambda store: store.save_job(job, "Will pause"),
        "checkpoint": lambda store: store.save_checkpoint(checkpoint),
        "file": lambda store: store.add_file(file),
        "step": lambda store: store.save_job(job, "Step 1", type="metrics"),
    }

    async def main():
        with contextlib.closing(Store(tmp_path / "state")) as store:
            store.file_path(file.id).write_bytes(b"x")
            for name, action in actions.items():
                statements.clear()
                await action(store)
                before_commit = [s for s in statements if s.startswith("PRAGMA synchronous") or s == "COMMIT"]
                expected = [f"PRAGMA synchronous={'NORMAL' if name == 'step' else 'FULL'}", "COMMIT"]
                assert before_commit[:2] == expected, name

    monkeypatch.setattr(sqlite3, "connect", functools.partial(traced, statements, sqlite3.connect))
    asyncio.run(main())
