"""Writes to the database: locked, full, damaged; and rows that cannot be read."""

import asyncio
import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import threading
import time

import pytest

from apollo_tp.coordinator.jobs import commits, reserve
from apollo_tp.coordinator.jobs.job import Checkpoint, JobSpec, State, StoredFile, new_job
from apollo_tp.coordinator.jobs.storage_error import StorageError, Trouble
from apollo_tp.coordinator.jobs.store import Store
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.jobs import ONE, ends

needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a disk")


@contextlib.contextmanager
def locked(path):
    """Another process's write transaction, as some backups hold it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_lock_delays_writes_alone(tmp_path):
    """Answers go on, and so does training; what was asked meanwhile is acknowledged once it is stored."""
    with (
        CoordinatorProcess(tmp_path) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.05) as ranks,
        coordinator.client() as client,
    ):
        running = client.post("/train", json=ONE | {"epochs": 10_000}).json()["id"]
        wait_for(lambda: len(ranks.applied()) > 2)
        answers = []
        posting = threading.Thread(target=lambda: answers.append(client.post("/train", json=ONE)))
        with locked(tmp_path / "state" / "jobs.sqlite3"), coordinator.client() as other:
            posting.start()
            before, slowest, end = len(ranks.applied()), 0.0, time.monotonic() + 3.0
            while time.monotonic() < end:
                begun = time.monotonic()
                assert other.get("/train/status").status_code == 200
                slowest = max(slowest, time.monotonic() - begun)
                time.sleep(0.02)
            assert slowest < 1.0
            assert len(ranks.applied()) > before + 10
            assert answers == []
        posting.join(20)
        assert answers[0].status_code == 202
        assert "locked by another process" in coordinator.log_path.read_text()
        client.post(f"/train/jobs/{running}/cancel")
        assert ends(client, answers[0].json()["id"])["state"] == "succeeded"
        steps = [step for name, step in ranks.applied() if name == running]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("required", [True, False])
def test_a_lock_that_stays_is_named(tmp_path, monkeypatch, required):
    """A request is refused, and the next ones are not; what must not be lost ends the coordinator."""
    monkeypatch.setattr(commits, "LOCKED_SECONDS", 1.5)

    async def main():
        with contextlib.closing(Store(tmp_path)) as store:
            job = new_job("train", JobSpec(), State.queued)
            await store.add_job(job, max_queued=9)
            with locked(tmp_path / "jobs.sqlite3"):
                another = new_job("train", JobSpec(), State.queued)
                write = store.save_job(job, "x") if required else store.add_job(another, max_queued=9)
                with pytest.raises(StorageError) as error:
                    await write
            assert (error.value.trouble, error.value.status, error.value.code) == (
                Trouble.locked,
                503,
                "storage_locked",
            )
            if required:
                with pytest.raises(StorageError):
                    await store.failed()
            else:
                await store.save_job(job, "x")
                assert store.count_jobs()[State.queued] == 1

    asyncio.run(main())


@needs_root
def test_a_full_disk_refuses_requests_and_holds_training_until_there_is_room(small_disk):
    """507 with what is needed and free; a cancel is stored; nothing ends; and it starts again on the full disk."""
    with (
        CoordinatorProcess(small_disk) as coordinator,
        FakeRanks(coordinator.ranks_socket, small_disk.parent / "journal", step_seconds=0.002) as ranks,
    ):
        with coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            waiting = client.post("/train", json=ONE).json()["id"]
            client.post(f"/train/jobs/{waiting}/pause")
            job = client.post("/train", json=ONE | {"epochs": 10_000}).json()["id"]
            wait_for(lambda: len(ranks.applied()) > 5)
            ballast = small_disk / "ballast"
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            wait_for(lambda: not (small_disk / "state" / reserve.RESERVE).exists(), 30, "use of the space kept aside")
            refused = client.post("/train", json=ONE)
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
            assert "bytes free" in refused.json()["error"]["message"]
            upload = client.post("/v1/files", files={"file": ("a.jsonl", b"x" * 2**20)}, data={"purpose": "fine-tune"})
            assert upload.status_code == 507
            assert list((small_disk / "state" / "files").iterdir()) == []
            assert client.get("/train/status").status_code == 200
        coordinator.kill()
        coordinator.start()
        with coordinator.client() as client:
            assert client.post(f"/train/jobs/{waiting}/cancel").json()["state"] == "cancelled"
            ballast.unlink()
            before = len(ranks.applied())
            wait_for(lambda: len(ranks.applied()) > before + 5, 30, "training after there is room")
            client.post(f"/train/jobs/{job}/cancel")
            assert ends(client, job)["state"] == "cancelled"
    steps = [step for name, step in ranks.applied() if name == job]
    assert steps == list(range(1, len(steps) + 1))


def test_the_write_ahead_log_stays_small(tmp_path):
    """Thousands of steps write many times its limit."""

    async def main():
        with contextlib.closing(Store(tmp_path)) as store:
            job = new_job("train", JobSpec(), State.running)
            await store.add_job(job, max_queued=9)
            largest = 0
            for step in range(2000):
                store.save_job(job, f"Step {step}", type="metrics", data={"x": "y" * 500})
                if step % 20 == 0:
                    await store.stored()
                    largest = max(largest, (tmp_path / "jobs.sqlite3-wal").stat().st_size)
            assert largest < 2 * 2**20

    asyncio.run(main())


def test_the_space_kept_aside_is_made_again(tmp_path, monkeypatch):
    """Only where there is plenty of room."""
    kept = reserve.Reserve(tmp_path)
    monkeypatch.setattr(kept, "free", lambda: 2**21 - 1)
    assert not kept.keep()
    with pytest.raises(
        StorageError, match=rf"got {2**21 - 1} bytes free, expected at least {2**21 + 9} for 9 bytes"
    ) as e:
        kept.check(9)
    assert (e.value.status, e.value.code) == (507, "storage_full")
    monkeypatch.undo()
    assert kept.keep()
    assert (tmp_path / reserve.RESERVE).stat().st_blocks * 512 >= reserve.RESERVE_BYTES
    kept.check(9)
    assert kept.release()
    assert not kept.release()


@pytest.mark.parametrize("value", ["'{'", "x'ff'", "NULL", "7", "'{}'"])
@pytest.mark.parametrize("table", ["jobs", "events", "files", "checkpoints"])
def test_a_row_that_cannot_be_read_is_set_aside(tmp_path, table, value, caplog):
    """It neither prevents the start, nor hides the page that it is on; its files stay."""

    async def main():
        store = Store(tmp_path / "state")
        jobs = [new_job("train", JobSpec(), State.queued) for _ in range(3)]
        for number, job in enumerate(jobs):
            await store.add_job(job, max_queued=9)
            store.file_path(f"file-{number}").write_bytes(b"x")
            (store.samples_dir / f"{job.id}.train").write_bytes(b"x")
            await store.add_file(StoredFile(id=f"file-{number}", filename="a", bytes=1, created_at=1.0))
            await store.save_checkpoint(
                Checkpoint(id=f"c{number}", name=f"n-{number}", state="queued", reason="request", created_at=1.0)
            )
        store.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "state" / "jobs.sqlite3", isolation_level=None)) as db:
            if value == "NULL":
                db.execute("PRAGMA writable_schema=ON")
                db.execute("UPDATE sqlite_schema SET sql=replace(sql, 'data BLOB NOT NULL', 'data BLOB')")
            key = "id" if table == "events" else "seq"
            db.execute("PRAGMA writable_schema=RESET")
            db.execute(f"UPDATE {table} SET data={value} WHERE {key}=2")
        caplog.set_level(logging.ERROR)
        for _ in range(2):
            store = Store(tmp_path / "state")
            store.remove_orphans()
            assert store.checkpoint_named("n-0").id == "c0"
            assert len(store.queued_checkpoints()) == 3 - (table == "checkpoints")
            found = {
                "jobs": len(store.page_of_jobs(after=None, limit=9)[0]),
                "events": sum(len(store.events(job.id)) for job in jobs),
                "files": len(store.files()),
                "checkpoints": len(store.page_of_checkpoints()[0]),
            }
            if table != "events" or value != "'{}'":
                assert found.pop(table) == 2
            assert set(found.values()) == {3}
            assert len(store.jobs(State.queued)) == store.count_jobs()[State.queued] == 3 - (table == "jobs")
            assert store.file_path("file-1").exists()
            assert (store.samples_dir / f"{jobs[1].id}.train").exists()
            store.close()
        messages = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
        assert bool(messages) == (table != "events" or value != "'{}'")
        assert all(f"row 2 of {table}" in message for message in messages)

    asyncio.run(main())


def test_many_small_writes_are_few_transactions(tmp_path):
    """One fsync for all that waited."""

    async def main():
        with contextlib.closing(Store(tmp_path)) as store:
            job = new_job("train", JobSpec(), State.running)
            await store.add_job(job, max_queued=9)
            attempts = []
            attempt = store._commits._attempt
            store._commits._attempt = lambda writes: (attempts.append(len(writes)), attempt(writes))[1]
            for step in range(500):
                store.save_job(job, f"Step {step}")
            await store.stored()
            assert sum(attempts) == 501
            assert len(attempts) < 50

    asyncio.run(main())


def test_what_is_refused_by_a_key_leaves_the_writes_beside_it(tmp_path):
    """The same request twice at once is one job, and others in the same transaction are stored."""

    async def main():
        with contextlib.closing(Store(tmp_path)) as store:
            keys = [("/train", "once", "digest")] * 4 + [None] * 5
            jobs = [new_job("train", JobSpec(), State.queued) for _ in keys]
            adding = [store.add_job(job, max_queued=99, idempotency=key) for job, key in zip(jobs, keys, strict=True)]
            ids = await asyncio.gather(*adding)
            assert len(set(ids)) == 6
            assert len(store.page_of_jobs(after=None, limit=99)[0]) == len(store.jobs(State.queued)) == 6

    asyncio.run(main())
