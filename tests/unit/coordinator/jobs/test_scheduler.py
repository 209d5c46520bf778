"""Which command rank 0 gets next, and what a job becomes of its replies."""

import asyncio
import json
from types import SimpleNamespace

import msgspec
import pytest

from apollo_tp.coordinator.http.service import model_digest
from apollo_tp.coordinator.jobs.job import JobSpec, State, new_job
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.settings import Settings
from apollo_tp.shards.serving import ChatTemplate, ServedTokenizer, Serving
from apollo_tp.wire import commands
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.jobs import CHAT, ONE, ends


def test_a_job_whose_samples_are_gone_fails_alone(stack):
    """Its error is the missing file, and the next job runs."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.3
    first, second, third = (client.post("/train", json=ONE).json()["id"] for _ in range(3))
    (coordinator.folder / "state" / "samples" / f"{second}.train").unlink()
    assert [ends(client, job)["state"] for job in (first, second, third)] == ["succeeded", "failed", "succeeded"]
    assert "FileNotFoundError" in client.get(f"/train/jobs/{second}").json()["error"]["code"]


def test_a_step_in_flight_counts_when_the_next_one_cannot_be_read(stack):
    """What it wrote is in the weights."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.5
    job = client.post("/train", json=ONE | {"epochs": 9}).json()["id"]
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] == 1)
    (coordinator.folder / "state" / "samples" / f"{job}.train").unlink()
    failed = ends(client, job)
    wait_for(lambda: not client.get("/train/status").json()["trainer"]["busy_with"])
    assert (failed["state"], failed["step"]) == ("failed", len(ranks.applied()))
    assert failed["step"] > 1


def test_jobs_that_wait_for_another_model_are_not_trained(tmp_path):
    """Their token ids were made for another model; jobs of the served one run."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator, coordinator.client() as client:
        job = client.post("/train", json=ONE).json()["id"]
        file = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
        tuned = client.post("/v1/fine_tuning/jobs", json={"model": "fake", "training_file": file}).json()["id"]
        wait_for(lambda: client.get(f"/train/jobs/{tuned}").json()["state"] == "queued")
    template = model / "chat_template.jinja"
    template.write_text("another {{ messages[0]['content'] }}")
    tokenizers = [ServedTokenizer(sha256=text, eos_id=eos) for text, eos in (("a", 1), ("b", 1), ("a", 2))]
    servers = [
        Serving(),
        *(Serving(chat=ChatTemplate(text=text)) for text in "ab"),
        Serving(chat_template_kwargs={"x": 1}),
        *(Serving(tokenizer=tokenizer) for tokenizer in tokenizers),
    ]
    assert len({model_digest(model, serving) for serving in servers}) == len(servers)
    # a job of token ids has nothing to do with these
    failed = [Serving(chat_refusal=reason, text_refusal=reason) for reason in "ab"]
    assert len({model_digest(model, serving) for serving in failed}) == 1
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
    before = model_digest(model, Serving())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert model_digest(model, Serving()) == before
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 1}))
    assert model_digest(model, Serving()) != before


def test_a_step_whose_reply_comes_too_late_counts(impatient_stack):
    """The job has failed, but the step is in the weights: it is counted, and to be saved."""
    client, ranks, _ = impatient_stack
    ranks.step_seconds = 4.0
    job = client.post("/train", json=ONE).json()["id"]
    failed = ends(client, job)
    assert (failed["state"], failed["step"], failed["error"]["code"]) == ("failed", 0, "DeadlineError")
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["step"] == len(ranks.applied()) == 1)
    assert client.get("/train/status").json()["unsaved"]


def test_skipped_steps_count_in_a_row(stack):
    """Four of five are fewer than five in a row; twice that is not more."""
    client, ranks, _ = stack
    ranks.skip_at = {1, 2, 3, 4, 6, 7, 8, 9}
    job = client.post("/train", json=ONE | {"epochs": 10}).json()["id"]
    assert ends(client, job)["state"] == "succeeded"


@pytest.mark.parametrize("content", [b"", bytes(200), b"x" * 23])
def test_a_damaged_file_of_samples_fails_its_job_alone(stack, content):
    """The coordinator ended, and ended again at every start."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.3
    first, second, third = (client.post("/train", json=ONE).json()["id"] for _ in range(3))
    (coordinator.folder / "state" / "samples" / f"{second}.train").write_bytes(content)
    assert [ends(client, job)["state"] for job in (first, second, third)] == ["succeeded", "failed", "succeeded"]
    assert client.get(f"/train/jobs/{second}").json()["error"]["code"] == "SamplesError"


@pytest.mark.parametrize("action", ["pause", "resume"])
def test_nothing_undoes_a_cancel_that_has_not_taken_effect(stack, action):
    """The client was told that the job will be cancelled."""
    client, ranks, _ = stack
    ranks.step_seconds = 1.0
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()["id"]
    wait_for(lambda: ranks.commands)
    assert client.post(f"/train/jobs/{job}/cancel").json()["state"] == "running"
    assert client.post(f"/train/jobs/{job}/{action}").status_code == 409
    assert ends(client, job)["state"] == "cancelled"


# --- without a process: replies and Hellos of rank 0 ------------------------------------------------------------------


@pytest.fixture
def scheduler(tmp_path):
    """One that is not running, over an empty store and a link without a peer."""
    settings = Settings(instance_dir=str(tmp_path), checkpoint_after_idle_seconds=0.0)
    store = Store(tmp_path / "state")
    link = SimpleNamespace(weight_version=1, hello=None, connected=False, new_id=lambda what: what)
    yield Scheduler(settings, store, link)
    store.close()


def interrupted(scheduler, *, step):
    """A job that a crash interrupted after ``step`` recorded steps of the server life "fake@1"."""
    job = new_job("train", JobSpec(epochs=9), State.queued)
    job.num_samples = job.total_steps = 9
    job.step, job.resumable, job.server_life = step, True, "fake@1"
    asyncio.run(scheduler.store.add_job(job, max_queued=9))
    return job


@pytest.mark.parametrize(("server_life", "counted"), [("fake@1", 5), ("fake@2", 3)])
def test_lost_steps_are_counted_in_the_life_of_their_server_alone(scheduler, tmp_path, server_life, counted):
    """The weights of another life are gone: counting its steps would skip them."""
    job = interrupted(scheduler, step=3)
    (tmp_path / "journal").write_text("".join(f"{job.id} {step}\n" for step in range(1, 6)))
    hello = FakeRanks("unused", tmp_path / "journal").hello()
    scheduler.reconcile(msgspec.structs.replace(hello, server_life=server_life))
    stored = scheduler.store.job(job.id)
    assert (stored.step, stored.state, stored.resumable) == (counted, State.queued, True)
    assert bool(scheduler.store.get_meta("unsaved")) == (counted == 5)


@pytest.mark.parametrize(("server_life", "unsaved"), [("fake@1", "1"), ("fake@2", "")])
def test_weights_of_a_server_that_is_gone_need_no_checkpoint(scheduler, tmp_path, server_life, unsaved):
    """The idle checkpoint would be one of weights that nobody has trained; those of the same server still need it."""
    hello = FakeRanks("unused", tmp_path / "journal").hello()
    scheduler.reconcile(msgspec.structs.replace(hello, server_life="fake@1"))
    scheduler.store.set_meta("unsaved", "1")
    scheduler.reconcile(msgspec.structs.replace(hello, server_life=server_life))
    assert scheduler.store.get_meta("unsaved") == unsaved


@pytest.mark.parametrize(("step", "counted"), [(3, 3), (4, 4), (5, 3), (9, 3)])
def test_an_orphan_reply_counts_only_if_it_is_of_the_next_step(scheduler, tmp_path, step, counted):
    """The steps before a later one were never recorded, and may not have run; rank 0's next Hello says how far it came."""
    job = interrupted(scheduler, step=3)
    command = commands.Step(id=f"{job.id}/{step}", job_id=job.id, job_step=step, samples=[])
    scheduler.orphan_reply(FakeRanks("unused", tmp_path / "journal")._step(command))
    assert scheduler.store.job(job.id).step == counted
    assert scheduler.store.get_meta("unsaved")  # the weights have changed all the same


@pytest.mark.parametrize("identity", ["", "/4", "job", "unknown/4", "{job}/x", "{job}/", "{job}/4/4"])
def test_an_orphan_reply_of_no_known_step_changes_no_job(scheduler, tmp_path, identity):
    """It is whatever a peer on the socket sent."""
    job = interrupted(scheduler, step=3)
    command = commands.Step(id=identity.format(job=job.id), job_id=job.id, job_step=4, samples=[])
    scheduler.orphan_reply(FakeRanks("unused", tmp_path / "journal")._step(command))
    assert scheduler.store.job(job.id) == job
