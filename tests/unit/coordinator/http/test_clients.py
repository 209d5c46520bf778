"""What clients meet: retries, several at once, quiet streams, a coordinator that starts again, options that do not fit."""

import asyncio
import threading
import time
from collections import Counter

import pytest

from apollo_tp.cli import main as cli
from apollo_tp.coordinator.http.views import Changes, event_stream
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
    """Of another method, or beside the method's own."""
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


def test_clients_at_once_get_no_errors(stack):
    """Posting from several threads."""
    client, *_ = stack

    def post():
        codes.update(client.post("/train", json=ONE).status_code for _ in range(60))

    codes = Counter()
    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(codes) == {202}


def test_a_client_of_a_quiet_job_hears_that_it_is_alive(tmp_path, monkeypatch):
    """However much else changes."""
    monkeypatch.setattr("apollo_tp.coordinator.http.views.KEEP_ALIVE_SECONDS", 0.3)

    async def main():
        changes = Changes()
        store = Store(tmp_path, changes.notify)
        job = new_job("train", JobSpec(), State.queued)
        store.add_job(job, max_queued=9)
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
        time.sleep(1.5)
        coordinator.settings.service.http.port = port
        coordinator.start()
        follow.join(30)
        assert codes == [0]
    assert "skipped" in capsys.readouterr().err
