"""What a coordinator meets when it runs for months: other models, many checkpoints, damaged files, clients at once."""

import asyncio
import json
import os
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from apollo_tp import cli
from apollo_tp.coordinator.jobs import JobSpec, State, new_job
from apollo_tp.coordinator.service import model_digest
from apollo_tp.coordinator.store import Store
from apollo_tp.coordinator.views import Changes, event_stream
from tests.unit.chat_model import write_model
from tests.unit.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.unit.test_coordinator_faults import CHAT, ONE, ends, saving, tune


@pytest.fixture
def stack(tmp_path):
    """As that of the faults, with short deadlines: a reply has 2 x 1 s and 1 s."""
    settings = {"command_timeout_seconds": 1.0}
    with (
        CoordinatorProcess(tmp_path, model_path=write_model(tmp_path / "model"), settings=settings) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks,
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield client, ranks, coordinator


def test_jobs_that_wait_for_another_model_are_not_trained(tmp_path):
    """Their token ids are those of a tokenizer that is gone; a job of the same model goes on."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator, coordinator.client() as client:
        job = client.post("/train", json=ONE).json()["id"]
        file = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
        tuned = client.post("/v1/fine_tuning/jobs", json={"model": "fake", "training_file": file}).json()["id"]
        wait_for(lambda: client.get(f"/train/jobs/{tuned}").json()["state"] == "queued")
    template = model / "chat_template.jinja"
    before = model_digest(model)
    template.write_text("another {{ messages[0]['content'] }}")
    assert model_digest(model) != before
    with (
        CoordinatorProcess(tmp_path, model_path=model) as coordinator,
        coordinator.client() as client,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks,
    ):
        new = client.post("/train", json=ONE).json()["id"]
        assert [ends(client, each)["state"] for each in (job, tuned, new)] == ["failed", "failed", "succeeded"]
        assert client.get(f"/train/jobs/{job}").json()["error"]["code"] == "model_changed"
        assert [name for name, _ in ranks.applied()] == [new]


def test_a_checkpoint_of_a_model_has_its_digest(tmp_path):
    """transformers writes its own version and name into the configuration."""
    model = write_model(tmp_path / "model")
    before = model_digest(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert model_digest(model) == before
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 1}))
    assert model_digest(model) != before


def test_disk_use_is_told_while_others_write(tmp_path, monkeypatch):
    """A file may be renamed between being listed and being looked at."""
    store = Store(tmp_path)
    (store.samples_dir / "stays").write_bytes(b"123")
    gone = SimpleNamespace(stat=lambda: (store.samples_dir / "renamed").stat())
    found = list(os.scandir(store.samples_dir))
    monkeypatch.setattr(
        "apollo_tp.coordinator.store.os.scandir", lambda folder: [gone, *found] if folder == store.samples_dir else []
    )
    assert store.used_bytes() == 3


def test_many_checkpoints_fail_no_job(stack):
    """Rank 0 works through what it was sent: neither checkpoints nor steps wait for longer than they may. Those that wait
    are one."""
    client, ranks, _ = stack
    ranks.save_seconds = 0.9
    asked = [client.post("/checkpoint").json()["id"] for _ in range(4)]
    assert len(set(asked)) == 2  # the one that is written, and the one behind it
    job = client.post("/train", json=ONE | {"epochs": 2}).json()["id"]
    assert ends(client, job)["state"] == "succeeded"
    wait_for(lambda: {c["state"] for c in client.get("/checkpoints").json()["data"]} == {"succeeded"})
    assert [client.get(f"/checkpoint/{identity}").json()["state"] for identity in asked] == ["succeeded"] * 4


def test_a_step_whose_reply_comes_too_late_counts(stack):
    """The job has failed, but the step is in the weights: it is counted, and to be saved."""
    client, ranks, _ = stack
    ranks.step_seconds = 4.0
    job = client.post("/train", json=ONE).json()["id"]
    failed = ends(client, job)
    assert (failed["state"], failed["step"], failed["error"]["code"]) == ("failed", 0, "DeadlineError")
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] == len(ranks.applied()) == 1)
    assert client.get("/train/status").json()["unsaved"]


def test_steps_that_are_counted_after_a_crash_are_saved(tmp_path):
    """A job whose only reply was lost: the idle checkpoint is written all the same."""
    settings = {"checkpoint_after_idle_seconds": 0.3}
    with (
        CoordinatorProcess(tmp_path, settings=settings, rank_timeout_seconds=30.0) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=1.0) as ranks,
    ):
        with coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = client.post("/train", json=ONE).json()["id"]
            wait_for(lambda: ranks.commands)
        coordinator.kill()
        wait_for(lambda: ranks.applied())
        time.sleep(0.2)  # its reply is on its way to nobody
        coordinator.start()
        with coordinator.client() as client:
            assert ends(client, job)["weight_version"] == 1
            wait_for(lambda: client.get("/checkpoints").json()["data"])
        assert len(ranks.applied()) == 1


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


def test_no_step_is_run_twice_after_many_questions(tmp_path):
    """A coordinator that starts while rank 0 is busy asks who it is again and again, and all of it is answered at once."""
    with (
        CoordinatorProcess(tmp_path, rank_timeout_seconds=0.3) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.05) as ranks,
    ):
        ranks.save_seconds, ranks.hello_seconds = 3.0, 0.01
        with coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            client.post("/checkpoint")
            wait_for(lambda: ranks.commands)
        coordinator.kill()
        coordinator.start()
        ranks.save_seconds = 0.0
        with coordinator.client() as client:
            job = client.post("/train", json=ONE | {"epochs": 4}).json()["id"]
            assert ends(client, job)["state"] == "succeeded"
        assert [step for _, step in ranks.applied()] == [1, 2, 3, 4]


def test_a_server_that_starts_again_under_its_name_is_another(tmp_path):
    """Half a job was trained into weights that are gone."""
    with CoordinatorProcess(tmp_path) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.1) as ranks:
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = client.post("/train", json=ONE | {"epochs": 50}).json()["id"]
            wait_for(lambda: len(ranks.applied()) > 3)
        wait_for(lambda: not client.get("/health").json()["trainer"])
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal2") as ranks:
            ranks.server_life = "fake@2"
            assert ends(client, job)["error"]["code"] == "server_restarted"
            assert ranks.applied() == []


@pytest.mark.parametrize("content", [b"", bytes(200), b"x" * 23])
def test_a_damaged_file_of_samples_fails_its_job_alone(stack, content):
    """The coordinator ended, and ended again at every start."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.3
    first, second, third = (client.post("/train", json=ONE).json()["id"] for _ in range(3))
    (coordinator.folder / "state" / "samples" / f"{second}.train").write_bytes(content)
    assert [ends(client, job)["state"] for job in (first, second, third)] == ["succeeded", "failed", "succeeded"]
    assert client.get(f"/train/jobs/{second}").json()["error"]["code"] == "SamplesError"


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
    monkeypatch.setattr("apollo_tp.coordinator.views.KEEP_ALIVE_SECONDS", 0.3)

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
