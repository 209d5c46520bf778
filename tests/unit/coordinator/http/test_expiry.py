"""Files and uploads whose time is over."""

import asyncio
import time

import pytest

from apollo_tp.coordinator.http.expiry import remove_expired
from apollo_tp.coordinator.http.openai_bodies import UploadBody
from apollo_tp.coordinator.http.openai_uploads import LIFE_SECONDS, Uploads
from apollo_tp.coordinator.jobs.job import JobSpec, State, StoredFile, new_job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import RequestError
from tests.support.jobs import CHAT


def test_an_expired_file_is_removed_unless_a_job_needs_it(tmp_path):
    """Once its time has come, and the job is over; another file stays."""
    asyncio.run(_check_expiry(tmp_path / "state"))


async def _check_expiry(folder):
    store = Store(folder)
    ids = ("used", "validates", "expired", "later", "kept")
    for name, expires in zip(ids, (50.0, 50.0, 50.0, 101.0, None), strict=True):
        store.file_path(name).write_bytes(CHAT)
        await store.add_file(StoredFile(id=name, filename=name, bytes=1, created_at=0, expires_at=expires))
    job = new_job("openai", JobSpec(training_file="used", validation_file="validates"), State.validating_files)
    await store.add_job(job, max_queued=9)
    for state, left in ((State.queued, ids[:2] + ids[3:]), (State.paused, ids[:2] + ids[3:]), (State.failed, ids[3:])):
        job.state = state
        await store.save_job(job)
        await remove_expired(store, 100.0)
        assert sorted(file.id for file in store.files()) == sorted(left), state
        assert sorted(p.name for p in store.disk.files_dir.iterdir()) == sorted(
            store.file_path(name).name for name in left
        )
    store.close()


def test_an_abandoned_upload_is_removed(tmp_path, monkeypatch):
    """After its hour, with its parts."""
    store = Store(tmp_path / "state")
    uploads = Uploads(store)
    one = uploads.begin(UploadBody(bytes=3, filename="a", mime_type="", purpose="fine-tune"))
    one.parts["part_1"] = 3
    store.file_path("part_1").write_bytes(b"abc")
    uploads.remove_expired()
    assert store.file_path("part_1").exists()
    later = time.time() + LIFE_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    uploads.remove_expired()
    assert not store.file_path("part_1").exists()
    with pytest.raises(RequestError, match="begin again"):
        uploads.pending(one.id)
    store.close()
