"""The OpenAI routes driven by the real ``openai`` package, on the coordinator's port; rank 0 is a fake."""

import json
import math

import openai
import pytest

from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for


def chat(i):
    return {
        "messages": [
            {"role": "user", "content": f"Hello {i}"},
            {"role": "assistant", "content": "I am fine", "weight": 1},
        ]
    }


def preference(i):
    return {
        "input": {"messages": [{"role": "user", "content": f"how are you {i}"}]},
        "preferred_output": [{"role": "assistant", "content": "fine thanks"}],
        "non_preferred_output": [{"role": "assistant", "content": "the answer"}],
    }


def jsonl(lines):
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("o")
    model = write_model(folder / "model")
    options = {"max_file_bytes": 100_000, "max_files": 40}
    with (
        CoordinatorProcess(folder, model_path=model, **options) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.01) as ranks,
        coordinator.client() as http,
    ):
        wait_for(lambda: http.get("/health").json()["trainer"])
        yield openai.OpenAI(base_url=f"{coordinator.url}/v1", api_key="unused"), ranks, http


def upload(client, lines, name="train.jsonl"):
    return client.files.create(file=(name, jsonl(lines)), purpose="fine-tune")


def finished(client, job, *, status="succeeded"):
    job = wait_for(lambda: (j := client.fine_tuning.jobs.retrieve(job.id)).finished_at and j)
    assert job.status == status, job.error
    return job


def test_a_supervised_job_from_upload_to_checkpoint(stack):
    """Upload, job, events, finished model, checkpoint: what the SDK's own types say."""
    client, ranks, http = stack
    file = upload(client, [chat(i) for i in range(10)])
    assert (file.object, file.purpose, file.status, file.filename) == ("file", "fine-tune", "processed", "train.jsonl")
    job = client.fine_tuning.jobs.create(
        model="fake", training_file=file.id, suffix="mine", metadata={"a": "b"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
    )  # fmt: skip
    assert job.status in ("validating_files", "queued")
    job = finished(client, job)
    assert job.fine_tuned_model == "fake"
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert job.metadata == {"a": "b"}
    shown = http.post("/train?dry_run=true", json={"samples": [chat(i) for i in range(10)]}).json()
    assert 0 < shown["num_loss_tokens"] < shown["num_tokens"]
    assert job.trained_tokens == 2 * shown["num_tokens"]  # of two epochs, context included
    assert [step for name, step in ranks.applied() if name == job.id] == [1, 2, 3, 4, 5, 6]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # five a page: the SDK follows the cursor
    assert [event.data["step"] for event in reversed(events) if event.type == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert len({event.id for event in events}) == len(events)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 6
    assert checkpoint.metrics.train_loss > 0
    assert checkpoint.fine_tuned_model_checkpoint.startswith("/ckpt/")
    assert job.id in [each.id for each in client.fine_tuning.jobs.list(limit=2)]


def test_validation_loss_at_intervals(stack):
    """valid_loss appears at intervals and at the end, computed from the ranks' log-probabilities."""
    client, ranks, _ = stack
    train, valid = (
        upload(client, [chat(i) for i in range(40)]),
        upload(client, [chat(i) for i in range(3)], "valid.jsonl"),
    )
    job = client.fine_tuning.jobs.create(
        model="fake", training_file=train.id, validation_file=valid.id, hyperparameters={"n_epochs": 1, "batch_size": 2}
    )
    job = finished(client, job)
    events = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    points = {event.data["step"]: event.data["valid_loss"] for event in events if "valid_loss" in event.data}
    assert sorted(points) == list(range(2, 21, 2))
    eos = 2  # the last token of every sample; the fake's loss is 0.5 * (1 + 0.01 * last token) per weighted token
    newline = json.loads((ranks.journal.parent / "model" / "tokenizer.json").read_text())["model"]["vocab"]["Ċ"]
    assert points[20] == pytest.approx(0.5 * (1 + 0.01 * newline))
    assert newline != eos
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.metrics.valid_loss == pytest.approx(points[20])


def test_dpo_scores_the_reference_before_the_first_step(stack):
    """All pairs are scored under the weights of the moment before step 1, and every step carries those numbers."""
    client, ranks, _ = stack
    train, valid = upload(client, [preference(i) for i in range(6)]), upload(client, [preference(9)], "valid.jsonl")
    before = len(ranks.applied())
    ranks.scored.clear()
    job = client.fine_tuning.jobs.create(
        model="fake", training_file=train.id, validation_file=valid.id, seed=1,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 3, "beta": 0.5}}},
    )  # fmt: skip
    job = finished(client, job)
    assert ranks.scored[0] == before
    steps = [command for command in ranks.commands if getattr(command, "job_id", "") == job.id]
    assert [(step.job_step, step.beta, len(step.pairs)) for step in steps] == [(i, 0.5, 3) for i in range(1, 5)]
    for pair in (pair for step in steps for pair in step.pairs):
        for sample, reference in ((pair.preferred, pair.reference_preferred), (pair.rejected, pair.reference_rejected)):
            assert reference == pytest.approx(-0.5 * sum(sample.weights) * (1 + 0.01 * sample.token_ids[-1]))
            assert sum(sample.weights) > 0
    events = [event for event in client.fine_tuning.jobs.list_events(job.id) if "valid_loss" in (event.data or {})]
    # the fake's log-probabilities never change, so policy equals reference: the loss is -log sigmoid(0)
    assert events[0].data["valid_loss"] == pytest.approx(math.log(2))


BAD_LINES = {
    "malformed": ("{", "malformed JSON"),
    "unknown field": (chat(1) | {"x": 1}, "unknown field"),
    "wrong role type": ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    "nothing to learn": ({"messages": [{"role": "user", "content": "x"}]}, "assistant"),
    "all weights zero": ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight above 0"),
    "too long": ({"messages": [{"role": "assistant", "content": "x " * 400}]}, "at most 256"),
    "not chat": ("[1]", "expected object"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_data_errors_are_found_before_training(stack, name):
    """A bad line fails the job while validating, with file, line and reason; the ranks hear nothing."""
    client, ranks, _ = stack
    line, reason = BAD_LINES[name]
    file = upload(client, [chat(0), chat(1), line, chat(2)], f"{name}.jsonl")
    before = len(ranks.commands)
    job = finished(client, client.fine_tuning.jobs.create(model="fake", training_file=file.id), status="failed")
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    for part in (f"{name}.jsonl", "line 3", reason):
        assert part in job.error.message
    assert len(ranks.commands) == before


def test_a_bad_validation_file_is_named(stack):
    """The error's param says which of the two files it was."""
    client, *_ = stack
    good, bad = upload(client, [chat(0)]), upload(client, ["x"], "bad.jsonl")
    job = client.fine_tuning.jobs.create(model="fake", training_file=good.id, validation_file=bad.id)
    job = finished(client, job, status="failed")
    assert job.error.param == "validation_file"


def test_requests_that_cannot_be_served(stack):
    """Unknown model, file, method or hyperparameter: the SDK's own exception types, with param."""
    client, *_ = stack
    file = upload(client, [chat(0)])
    create = client.fine_tuning.jobs.create
    with pytest.raises(openai.NotFoundError) as error:
        create(model="gpt-9", training_file=file.id)
    assert error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        create(model="fake", training_file="file-none")
    assert error.value.param == "training_file"
    with pytest.raises(openai.BadRequestError):
        create(model="fake", training_file=file.id, method={"type": "reinforcement"})
    with pytest.raises(openai.BadRequestError):
        create(model="fake", training_file=file.id, hyperparameters={"n_epochs": "many"})
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-none")


def test_files(stack, tmp_path):
    """List, content, delete; odd names stay names; limits answer 400 and 413."""
    client, _, http = stack
    content = jsonl([chat(0)])
    file = client.files.create(file=("../../etc/passwd\x00\u202e.jsonl", content), purpose="fine-tune")
    assert client.files.content(file.id).read() == content
    assert client.files.retrieve(file.id).bytes == len(content)
    assert file.id in [each.id for each in client.files.list(limit=3)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("x", content), purpose="batch")
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("x", b""), purpose="fine-tune")
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("x", b" " * 200_000), purpose="fine-tune")
    assert error.value.status_code == 413
    assert http.post("/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    assert http.get("/v1/files/..%2f..%2fjobs.sqlite3/content").status_code == 404


def test_lists_are_filtered(stack):
    """Files by purpose and order, jobs by metadata, over several pages; what is not understood is refused."""
    client, _, http = stack
    files = [upload(client, [chat(0)]).id for _ in range(3)]
    ids = [file.id for file in client.files.list(purpose="fine-tune", order="asc", limit=2)]
    assert ids[-3:] == files
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    create = client.fine_tuning.jobs.create
    tags = [{"run": "1", "part": "a"}, {"run": "2", "part": "a"}, {"part": "a", "run": "1"}, None]
    jobs = [finished(client, create(model="fake", training_file=files[0], metadata=tag)).id for tag in tags]
    for wanted, found in (
        ({"run": "1"}, [jobs[2], jobs[0]]),
        ({"run": "2", "part": "a"}, [jobs[1]]),
        ({"run": "a"}, []),
    ):
        assert [job.id for job in client.fine_tuning.jobs.list(metadata=wanted, limit=1)] == found
    for query in (
        "files?purpose=bach",
        "files?order=up",
        "fine_tuning/jobs?metadata=x",
        "fine_tuning/jobs?metadata[a=b",
        "fine_tuning/jobs?order=asc",
        "files/x?limit=2",
    ):
        answer = http.get(f"/v1/{query}")
        assert (answer.status_code, answer.json()["error"]["param"] in query) == (400, True), query


def test_cancel_pause_resume(stack):
    """The SDK's cancel, pause and resume."""
    client, *_ = stack
    file = upload(client, [chat(i) for i in range(8)])
    job = client.fine_tuning.jobs.create(model="fake", training_file=file.id, hyperparameters={"n_epochs": 500})
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
    client.fine_tuning.jobs.pause(job.id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).paused)
    client.fine_tuning.jobs.resume(job.id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
    client.fine_tuning.jobs.cancel(job.id)
    finished(client, job, status="cancelled")


def test_a_job_that_is_cancelled_while_its_files_are_validated_stays_cancelled(stack):
    """The end of the validation, for which it waits behind another job's, does not queue it."""
    client, ranks, _ = stack
    create = client.fine_tuning.jobs.create
    large, small = upload(client, [chat(i) for i in range(700)]), upload(client, [chat(0)])
    first = create(model="fake", training_file=large.id, hyperparameters={"batch_size": 700})
    second = create(model="fake", training_file=small.id)
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    third = create(model="fake", training_file=small.id)
    for job in (first, third):  # both are queued after the second one's validation, or before it began
        finished(client, job)
    finished(client, second, status="cancelled")
    assert second.id not in [name for name, _ in ranks.applied()]


def test_native_clients_see_the_same_job(stack):
    """A fine-tuning job is a job: /train/jobs shows it, with its events."""
    client, _, http = stack
    job = finished(client, client.fine_tuning.jobs.create(model="fake", training_file=upload(client, [chat(0)]).id))
    shown = http.get(f"/train/jobs/{job.id}").json()
    assert (shown["state"], shown["source"]) == ("succeeded", "openai")
    assert http.get(f"/train/jobs/{job.id}/events").json()["data"]


def test_chat_samples_and_dry_run_over_train(stack):
    """POST /train takes messages, prompt + completion and text; a dry run shows each token with its weight."""
    _, _, http = stack
    body = {"samples": [chat(0), {"prompt": "Hello", "completion": " there"}, {"text": "fine"}]}
    shown = http.post("/train?dry_run=1", json=body).json()
    learned = ["".join(t for t, w in zip(s["tokens"], s["weights"], strict=True) if w) for s in shown["samples"]]
    assert learned[0] == "I am fine<|im_end|>"
    assert learned[1] == " there<|im_end|>"
    assert http.post("/train", json=body | {"wait": True}).json()["state"] == "succeeded"
