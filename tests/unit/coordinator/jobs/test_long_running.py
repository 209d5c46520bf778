"""What a coordinator meets when it runs for months: other models, many checkpoints, damaged files, clients at once."""

import json
import math
import os
import time
from types import SimpleNamespace

import pytest

from apollo_tp.coordinator.http.service import model_digest
from apollo_tp.coordinator.jobs.job import JobSpec, State, new_job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.shards.serving import ChatTemplate, Serving
from apollo_tp.wire import commands
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import CHAT, ONE, ends, saving, tune


@pytest.fixture
def stack(tmp_path):
    """As that of the faults, with short deadlines: a reply has 2 x 1 s and 1 s."""
    with chat_stack(tmp_path, settings={"command_timeout_seconds": 1.0}) as parts:
        yield parts


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
    templates = [
        None,
        *(Serving(chat=ChatTemplate(text=text)) for text in "ab"),
        Serving(chat_template_kwargs={"x": 1}),
    ]
    assert len({model_digest(model, None, serving) for serving in templates}) == len(templates)
    failed = [Serving(chat_refusal=reason) for reason in "ab"]  # a job of token ids has nothing to do with it
    assert len({model_digest(model, None, serving) for serving in failed}) == 1
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


def test_the_oldest_steps_of_jobs_that_are_over_are_forgotten(tmp_path, monkeypatch):
    """Else the database of a service that trains for months would fill the disk. What else happened stays."""
    monkeypatch.setattr("apollo_tp.coordinator.jobs.store.MAX_EVENTS", 20)
    store = Store(tmp_path)
    over, running = new_job("train", JobSpec(), State.running), new_job("train", JobSpec(), State.running)
    for job in (over, running):
        store.add_job(job, max_queued=9)
    for step in range(30):
        for job in (over, running):
            store.save_job(job, f"Step {step}", type="metrics")
    over.state = State.succeeded
    store.save_job(over, "over")
    store.forget_old_steps()
    assert [event.message for event in store.events(over.id)] == [
        "Job running",
        *(f"Step {step}" for step in range(21, 30)),
        "over",
    ]
    assert len(store.events(running.id)) == 31


def test_disk_use_is_told_while_others_write(tmp_path, monkeypatch):
    """A file may be renamed between being listed and being looked at."""
    store = Store(tmp_path)
    (store.samples_dir / "stays").write_bytes(b"123")
    gone = SimpleNamespace(stat=lambda: (store.samples_dir / "renamed").stat())
    found = list(os.scandir(store.samples_dir))
    monkeypatch.setattr(
        "apollo_tp.coordinator.jobs.store.os.scandir",
        lambda folder: [gone, *found] if folder == store.samples_dir else [],
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
    first = client.get("/checkpoints?limit=1").json()
    second = client.get(f"/checkpoints?limit=1&after={first['data'][0]['id']}").json()
    assert [page["has_more"] for page in (first, second)] == [True, False]
    assert [page["data"][0]["id"] for page in (first, second)] == [asked[-1], asked[0]]


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


def test_a_checkpoint_that_fails_is_said_and_tried_again_now_and_then(tmp_path):
    """The job has succeeded, as its weights are served. The idle checkpoint is tried again after its time, not at once."""
    with chat_stack(tmp_path, settings={"checkpoint_after_idle_seconds": 0.4}) as (client, ranks, _):
        ranks.fail_saves = True
        job = tune(client, training_file=CHAT)
        assert ends(client, job)["state"] == "succeeded"
        events = client.get(f"/train/jobs/{job}/events").json()["data"]
        assert [e["message"] for e in events if e["level"] == "warn"] == [
            "Checkpoint failed: rank 0 raised OSError: no space left"
        ]
        assert client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"] == []
        begun = time.monotonic()
        wait_for(lambda: len(client.get("/checkpoints").json()["data"]) == 4)
        assert time.monotonic() - begun > 0.8  # three of the idle ones, 0.4 s after each other
        assert client.get("/train/status").json()["unsaved"]
        ranks.fail_saves = False
        wait_for(lambda: not client.get("/train/status").json()["unsaved"])


def test_what_is_trained_while_a_checkpoint_is_written_is_not_saved_by_it(stack):
    """The step behind it in the queue."""
    client, ranks, _ = stack
    ranks.save_seconds = 0.5
    client.post("/checkpoint")
    job = client.post("/train", json=ONE).json()["id"]
    assert ends(client, job)["state"] == "succeeded"
    wait_for(lambda: client.get("/checkpoints").json()["data"][0]["state"] == "succeeded")
    assert client.get("/train/status").json()["unsaved"]


def test_skipped_steps_count_in_a_row(stack):
    """Four of five are fewer than five in a row; twice that is not more."""
    client, ranks, _ = stack
    ranks.skip_at = {1, 2, 3, 4, 6, 7, 8, 9}
    job = client.post("/train", json=ONE | {"epochs": 10}).json()["id"]
    assert ends(client, job)["state"] == "succeeded"


def test_the_validation_loss_of_pairs_is_that_of_their_margin(stack):
    """-log sigmoid(beta * margin) over the weights from before the first step, for pairs of the validation file."""
    client, ranks, _ = stack
    ranks.learned = 0.1

    def pair(number, good, bad):
        def answer(text):
            return [{"role": "assistant", "content": text}]

        prompt = {"messages": [{"role": "user", "content": f"Hello {number}"}]}
        return {"input": prompt, "preferred_output": answer(good), "non_preferred_output": answer(bad)}

    def lines(*pairs):
        return "\n".join(json.dumps(pair(*each)) for each in pairs).encode()

    files = {
        "training_file": lines((0, "I am fine", "x"), (1, "yes", "a b c d")),
        "validation_file": lines((2, "one two three four", "I am")),
    }
    ids = {
        name: client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
        for name, content in files.items()
    }
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 2, "beta": 0.5,
                                                         "learning_rate_multiplier": 0.25}}}  # fmt: skip
    job = client.post("/v1/fine_tuning/jobs", json={"model": "fake", "method": method} | ids).json()["id"]
    found = ends(client, job)
    assert found["state"] == "succeeded", found["error"]
    (step,) = [command for command in ranks.commands if isinstance(command, commands.PreferenceStep)]
    assert step.learning_rate_scale == 0.25
    scored = [command for command in ranks.commands if isinstance(command, commands.Score)]
    preferred, rejected = scored[-1].samples  # of the validation pair, after the step

    def reference(sample):
        return -0.5 * sum(sample.weights) * (1 + 0.01 * sample.token_ids[-1])

    # a step makes each log-probability 1.1 times what it was
    margin = 0.1 * (reference(preferred) - reference(rejected))
    assert abs(margin) > 0.05
    assert found["valid_loss"] == pytest.approx(math.log1p(math.exp(-0.5 * margin)))
    assert found["valid_token_accuracy"] == float(margin > 0)


@pytest.mark.parametrize("content", [b"", bytes(200), b"x" * 23])
def test_a_damaged_file_of_samples_fails_its_job_alone(stack, content):
    """The coordinator ended, and ended again at every start."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.3
    first, second, third = (client.post("/train", json=ONE).json()["id"] for _ in range(3))
    (coordinator.folder / "state" / "samples" / f"{second}.train").write_bytes(content)
    assert [ends(client, job)["state"] for job in (first, second, third)] == ["succeeded", "failed", "succeeded"]
    assert client.get(f"/train/jobs/{second}").json()["error"]["code"] == "SamplesError"
