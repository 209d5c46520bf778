"""Jobs of a coordinator, over HTTP: what to train on, how to start one, and how to wait for it."""

from __future__ import annotations

from tests.support.fakes import wait_for

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}
CHAT = b'{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am fine"}]}\n'


def tune(client, *, method=None, **contents):
    """Start a job over uploaded files; it writes a checkpoint before it succeeds."""
    files = {}
    for name, content in contents.items():
        upload = {"file": ("a.jsonl", content)}
        files[name] = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
    return client.post("/v1/fine_tuning/jobs", json={"model": "fake", "method": method} | files).json()["id"]


def saving(client, job):
    """Whether a checkpoint of the job is being written."""
    return [c for c in client.get("/checkpoints").json()["data"] if c["job_id"] == job and c["state"] == "queued"]


def ends(client, job):
    """Wait until the job is over or paused; returns its view."""
    states = ("succeeded", "failed", "cancelled", "paused")
    return wait_for(lambda: (j := client.get(f"/train/jobs/{job}").json())["state"] in states and j)
