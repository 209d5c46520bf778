"""What clients meet: retries, several at once, quiet streams, a coordinator that starts again, options that do not fit."""

import asyncio
import gzip
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from apollo_tp.cli import main as cli
from apollo_tp.coordinator.http.train import STREAMS_PER_CLIENT
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


def test_what_is_given_twice_is_refused(stack):
    """A second dry_run=false trained, and of two keys one was used."""
    client, *_ = stack
    twice = [("dry_run", "true"), ("dry_run", "false")]
    for method, path, query in (
        ("POST", "/train", twice), ("POST", "/train", twice[:1] * 2), ("GET", "/train/jobs", [("limit", 1), ("limit", 2)]),
        ("GET", "/v1/fine_tuning/jobs", [("metadata[a]", "b")] * 2), ("GET", "/train/status", [("x", 1)] * 2),
        ("GET", "/v1/files", [("purpose", "batch"), ("purpose", "fine-tune")]),
    ):  # fmt: skip
        answer = client.request(method, path, params=query, json=ONE)
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, query[0][0]), answer.text
        assert "twice" in answer.json()["error"]["got"]
    many = client.get("/v1/fine_tuning/jobs", params={f"metadata[{n}]": "x" for n in range(100)})
    assert (many.status_code, many.json()["error"]["field"]) == (400, "query")
    keys = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert client.post("/train", json=ONE, headers=keys).json()["error"]["field"] == "Idempotency-Key"
    assert client.get("/train/jobs").json()["data"] == []


def test_a_cursor_is_an_entry_of_the_list(stack):
    """Not one of another list: the page after it would be any."""
    client, *_ = stack
    own, other = tune(client, training_file=CHAT), tune(client, training_file=CHAT)
    trained = client.post("/train", json=ONE | {"wait": True}).json()["id"]
    for job in (own, other):
        ends(client, job)
    checkpoints = f"/v1/fine_tuning/jobs/{own}/checkpoints"
    saved = [wait_for(lambda job=job: client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"])[0]["id"]
             for job in (own, other)]  # fmt: skip
    for path, good, bad in (
        (checkpoints, saved[0], saved[1]), ("/v1/fine_tuning/jobs", other, trained), ("/checkpoints", saved[1], own),
    ):  # fmt: skip
        assert client.get(path, params={"after": good}).status_code == 200, path
        answer = client.get(path, params={"after": bad})
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "after"), path
    assert client.get("/train/jobs", params={"after": other}).status_code == 200


def test_routes_that_are_not_there_are_refused_with_those_that_are(stack):
    """As the SDK's other calls with the trainer's base URL."""
    client, *_ = stack
    for method, path, status in (
        ("POST", "/v1/chat/completions", 405), ("DELETE", "/v1/models/fake", 405), ("GET", "/train/", 404),
        ("POST", "/v1/fine_tuning/alpha/graders/list", 404), ("PUT", "/train", 405),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert message.startswith(f"{method} {path}: got no route")
        assert "/openapi.json" in message


def test_a_packed_body_is_named(stack):
    """Not read as JSON. An uploaded form's type may be written in any case."""
    client, *_ = stack
    packed = gzip.compress(json.dumps(ONE).encode())
    answer = client.post("/train", content=packed, headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (415, "Content-Encoding")
    assert client.post("/train", json=ONE, headers={"Content-Encoding": "identity"}).status_code == 202
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n' \
           b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n'  # fmt: skip
    kind = {"Content-Type": "Multipart/Form-Data; boundary=b"}
    assert client.post("/v1/files", content=form, headers=kind).status_code == 200


def test_the_head_of_a_stream_of_events_ends(stack):
    """It took one of the client's streams, and its connection, until the job was over."""
    client, ranks, _ = stack
    ranks.step_seconds = 0.2
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()["id"]
    for _ in range(STREAMS_PER_CLIENT + 1):
        head = client.head(f"/train/jobs/{job}/events?stream=true", timeout=5)
        assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert client.get("/health", timeout=5).status_code == 200
    client.post(f"/train/jobs/{job}/cancel")


def test_options_that_would_be_ignored_are_refused(stack):
    """Of another method, or in addition to those of the method."""
    client, *_ = stack
    file = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
    asked = {"model": "fake", "training_file": file, "hyperparameters": {"n_epochs": 1}}
    for method in (
        {"type": "supervised", "dpo": {"hyperparameters": {"n_epochs": 2}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.5}}},
    ):
        assert client.post("/v1/fine_tuning/jobs", json=asked | {"method": method}).status_code == 400, method
    with_beta = asked | {"hyperparameters": {"n_epochs": 1, "beta": 0.5}}
    assert client.post("/v1/fine_tuning/jobs", json=with_beta).json()["error"]["field"] == "hyperparameters.beta"
    for name, ours in (("n_epochs", "n_epochs"), ("epochs", "n_epochs"), ("lr", "learning_rate_multiplier")):
        error = client.post("/v1/fine_tuning/jobs", json=asked | {name: 1}).json()["error"]
        assert (error["field"], error["expected"].split(",")[0]) == (name, f"method.supervised.hyperparameters.{ours}")
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
