"""Jobs over real HTTP: failures, skipped steps, cancel, pause and resume, a full queue, events, checkpoints."""

from tests.support.fakes import wait_for

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


def test_a_failing_rank_fails_its_job_alone(stack):
    """The job carries the rank and its traceback; the next job runs."""
    client, ranks = stack
    ranks.fail_at = {2}
    job = client.post("/train", json=ONE | {"epochs": 5, "wait": True}).json()
    ranks.fail_at = set()
    assert job["state"] == "failed"
    assert (job["error"]["rank"], job["error"]["code"]) == (1, "rank_failed")
    assert "RuntimeError: boom" in job["error"]["traceback"]
    events = client.get(f"/train/jobs/{job['id']}/events").json()["data"]
    assert events[-1]["level"] == "error"
    assert "RuntimeError: boom" in events[-1]["data"]["traceback"]
    assert client.post("/train", json=ONE | {"wait": True}).json()["state"] == "succeeded"


def test_skipped_steps_in_a_row_fail_the_job(stack):
    """A skipped step is reported and counted; five in a row (the limit) end the job, not fewer."""
    client, ranks = stack
    ranks.skip_at = {1, 2, 3, 4}
    assert client.post("/train", json=ONE | {"epochs": 5, "wait": True}).json()["state"] == "succeeded"
    ranks.skip_at = {1, 2, 3, 4, 5}
    job = client.post("/train", json=ONE | {"epochs": 20, "wait": True}).json()
    ranks.skip_at = set()
    assert job["state"] == "failed"
    assert "not finite" in job["error"]["message"]
    # one further step may have been in flight
    assert job["step"] in (5, 6)


def test_cancel_takes_effect_at_the_next_step(stack):
    """After the cancel at most the two steps in flight are written; the job is cancelled; cancelling again is fine."""
    client, ranks = stack
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()
    wait_for(lambda: client.get(f"/train/jobs/{job['id']}").json()["step"] >= 3)
    at = client.post(f"/train/jobs/{job['id']}/cancel").json()["step"]
    ended = wait_for(lambda: (j := client.get(f"/train/jobs/{job['id']}").json())["state"] == "cancelled" and j)
    assert ended["step"] <= at + 3
    assert len([1 for name, _ in ranks.applied() if name == job["id"]]) == ended["step"]
    assert client.post(f"/train/jobs/{job['id']}/cancel").status_code == 200
    assert client.post(f"/train/jobs/{job['id']}/resume").status_code == 409


def test_pause_and_resume_lose_and_repeat_nothing(stack):
    """A paused job keeps its place; another runs meanwhile; resumed, it trains every step exactly once."""
    client, ranks = stack
    job = client.post("/train", json=ONE | {"epochs": 12}).json()
    path = f"/train/jobs/{job['id']}"
    wait_for(lambda: client.get(path).json()["step"] >= 2)
    client.post(f"{path}/pause")
    paused = wait_for(lambda: (j := client.get(path).json())["state"] == "paused" and j)
    assert paused["step"] < 12
    assert client.post("/train", json=ONE | {"wait": True}).json()["state"] == "succeeded"
    assert client.get(path).json()["step"] == paused["step"]
    assert client.post(f"{path}/resume").status_code == 200
    wait_for(lambda: client.get(path).json()["state"] == "succeeded")
    assert [step for name, step in ranks.applied() if name == job["id"]] == list(range(1, 13))


def test_a_full_queue_answers_429(stack):
    """Beyond max_queued_jobs (3) the answer is 429 with Retry-After; a queued job can be cancelled."""
    client, _ = stack
    running = client.post("/train", json=ONE | {"epochs": 1000}).json()
    wait_for(lambda: client.get(f"/train/jobs/{running['id']}").json()["state"] == "running")
    queued = [client.post("/train", json=ONE).json() for _ in range(3)]
    refused = client.post("/train", json=ONE)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert [entry["id"] for entry in client.get("/train/status").json()["queue"]] == [job["id"] for job in queued]
    for job in [*queued, running]:
        assert client.post(f"/train/jobs/{job['id']}/cancel").status_code == 200
    wait_for(lambda: client.get("/train/status").json()["running"] is None)


def test_idempotency_key_makes_a_repeat_safe(stack):
    """The same key and body give the same job; the same key with another body is refused."""
    client, _ = stack
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/train", json=ONE | {"wait": True}, headers=headers).json()
    again = client.post("/train", json=ONE | {"wait": True}, headers=headers)
    assert again.json()["id"] == first["id"]
    assert again.headers["idempotent-replay"] == "true"
    assert client.post("/train", json=ONE | {"epochs": 2}, headers=headers).status_code == 422
    saved = client.post("/checkpoint", json={}, headers=headers).json()
    assert client.post("/checkpoint", json={}, headers=headers).json()["id"] == saved["id"]


def test_events_stream_replays_and_follows(stack):
    """SSE gives every event once, live, ends with the job, and continues after Last-Event-ID."""
    client, _ = stack
    job = client.post("/train", json=ONE | {"epochs": 8}).json()
    path = f"/train/jobs/{job['id']}/events"
    with client.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        ids = [int(line[4:]) for line in stream.iter_lines() if line.startswith("id: ")]
    listed = [event["id"] for event in client.get(path).json()["data"]]
    assert ids == listed
    rest = client.get(f"{path}?stream=true", headers={"Last-Event-ID": str(ids[4])}).text
    assert [int(line[4:]) for line in rest.splitlines() if line.startswith("id: ")] == ids[5:]


def test_checkpoint_between_steps_of_a_running_job(stack):
    """POST /checkpoint does not wait for the job's end: it is sent between two of its steps."""
    client, _ranks = stack
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()
    wait_for(lambda: client.get(f"/train/jobs/{job['id']}").json()["step"] >= 2)
    saved = client.post("/checkpoint", json={"wait": True, "wait_seconds": 10})
    assert saved.status_code == 200
    assert saved.json()["state"] == "succeeded"
    assert saved.json()["path"].startswith("/ckpt/")
    assert client.get(f"/train/jobs/{job['id']}").json()["state"] == "running"
    assert client.get(f"/checkpoint/{saved.json()['id']}").json()["path"] == saved.json()["path"]
    client.post(f"/train/jobs/{job['id']}/cancel")
    wait_for(lambda: client.get("/train/status").json()["running"] is None)
