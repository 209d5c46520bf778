"""What clients meet: retries, several at once, quiet streams, a coordinator that starts again, options that do not fit."""

import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from apollo_tp.cli import main as cli
from apollo_tp.coordinator.http.views import event_stream
from apollo_tp.coordinator.jobs.changes import Changes
from apollo_tp.coordinator.jobs.job import JobSpec, State, new_job
from apollo_tp.coordinator.jobs.store import Store
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import CHAT, ONE, ends, tune


@pytest.fixture
def stack(tmp_path):
    with chat_stack(tmp_path) as parts:
        yield parts


def test_a_retry_that_waits_is_answered_at_the_end(stack):
    """With the key of a request whose connection broke: not at once, and 202 while the job runs."""
    client, ranks, _ = stack
    ranks.step_seconds = 0.5
    key = {"Idempotency-Key": "once"}
    body = ONE | {"wait": True, "wait_seconds": 0.1}
    first = client.post("/train", json=body, headers=key)
    assert (first.status_code, first.json()["state"]) == (202, "running")
    again = client.post("/train", json=body, headers=key)
    assert (again.status_code, again.json()["state"]) == (202, "running")
    answer = client.post("/train?wait=true", json=ONE | {"wait": True}, headers={"Idempotency-Key": "other"})
    retried = client.post("/train?wait=true", json=ONE | {"wait": True}, headers={"Idempotency-Key": "other"})
    assert [a.json()["state"] for a in (answer, retried)] == ["succeeded"] * 2
    ranks.save_seconds = 0.5
    bodies = [client.post("/checkpoint", json={"wait": True}, headers=key).json() for _ in range(2)]
    assert [body["state"] for body in bodies] == ["succeeded"] * 2
    assert bodies[0]["id"] == bodies[1]["id"]


def test_the_validation_loss_of_the_last_evaluation_is_a_metric(stack):
    """Not that of the one before."""
    client, *_ = stack
    job = tune(client, training_file=CHAT, validation_file=CHAT)
    loss = ends(client, job)["valid_loss"]
    assert f"apollo_validation_loss_nats {loss}" in client.get("/metrics").text


def test_options_that_would_be_ignored_are_refused(stack):
    """Of another method, or in addition to those of the method."""
    client, *_ = stack
    file = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
    asked = {"model": "fake", "training_file": file, "hyperparameters": {"n_epochs": 1}}
    for method in (
        {"type": "supervised", "dpo": {"hyperparameters": {"n_epochs": 2}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    ):
        assert client.post("/v1/fine_tuning/jobs", json=asked | {"method": method}).status_code == 400, method
    job = client.post("/v1/fine_tuning/jobs", json=asked | {"method": {"type": "supervised", "supervised": {}}}).json()
    assert job["hyperparameters"]["n_epochs"] == 1


def test_clients_at_once_get_no_errors(tmp_path):
    """Posting from several threads, however slowly the jobs are trained meanwhile."""

    def post():
        codes.update(client.post("/train", json=ONE).status_code for _ in range(60))

    codes = Counter()
    with chat_stack(tmp_path, max_queued_jobs=1000) as (client, *_):
        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert codes == {202: 240}


def test_the_coordinator_starts_without_what_is_slow_to_import():
    """FastAPI and pydantic are imported, torch and transformers not, nor what only some coordinators use."""
    slow = ("torch", "transformers", "numpy", "vllm", "httpx", "tensorboard", "wandb")
    script = f"import sys, apollo_tp.coordinator.__main__; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_answers_on_a_kept_connection_are_sent_at_once(stack):
    """Not after the 40 ms for which a client's kernel delays its acknowledgement of the headers."""
    client, *_ = stack
    for path in ("/health", "/train/status", "/metrics"):
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            assert client.get(path).status_code == 200
            seconds.append(time.perf_counter() - start)
        assert statistics.median(seconds) < 0.02, (path, seconds)


def test_a_client_of_a_quiet_job_gets_keep_alive_comments(tmp_path, monkeypatch):
    """However many other changes are stored."""
    monkeypatch.setattr("apollo_tp.coordinator.http.views.KEEP_ALIVE_SECONDS", 0.3)

    async def main():
        changes = Changes()
        store = Store(tmp_path, changes.notify)
        job = new_job("train", JobSpec(), State.queued)
        await store.add_job(job, max_queued=9)
        stream = event_stream(store, changes, job.id, 0)
        assert b"event: state" in await anext(stream)

        async def others():
            while True:
                changes.notify()
                await asyncio.sleep(0.02)

        noise = asyncio.create_task(others())
        async with asyncio.timeout(5):
            assert b"still there" in await anext(stream)
        noise.cancel()

    asyncio.run(main())


def test_following_a_job_survives_a_skipped_step_and_a_restart(tmp_path, capsys):
    """``apollo-tp events --follow``: a step without a loss is a line, and a coordinator that starts again is waited for."""
    settings = {"max_skipped_steps": 9}
    with (
        CoordinatorProcess(tmp_path, settings=settings) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.2) as ranks,
        coordinator.client() as client,
    ):
        ranks.skip_at, ranks.loss_of_skipped = {2}, float("nan")
        wait_for(lambda: client.get("/health").json()["trainer"])
        port = int(coordinator.url.rpartition(":")[2])
        job = client.post("/train", json=ONE | {"epochs": 12}).json()["id"]
        codes = []
        follow = threading.Thread(
            target=lambda: codes.append(cli.main(["events", "--url", coordinator.url, job, "--follow"]))
        )
        follow.start()
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] >= 4)
        coordinator.kill()
        shown = []

        def failed_to_reconnect():
            shown.append(capsys.readouterr().err)
            return "".join(shown).count("connection broke") >= 2  # the stream, and then an attempt to open another

        wait_for(failed_to_reconnect)
        coordinator.settings.service.http.port = port
        coordinator.start()
        follow.join(30)
        assert codes == [0]
    assert "skipped" in "".join(shown) + capsys.readouterr().err
