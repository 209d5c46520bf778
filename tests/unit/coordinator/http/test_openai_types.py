"""What programs for OpenAI's API check and use beyond the usual path: the SDK's types, views sent back, cursors, results,
uploads in parts, expiry. The client validates every answer against the SDK's types."""

import concurrent.futures
import csv
import hashlib
import io
import itertools
from typing import get_args

import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from apollo_tp.coordinator.graders.schema import StringCheck
from apollo_tp.coordinator.http import openai_jobs
from apollo_tp.coordinator.jobs.job import JobSpec, State, new_job
from apollo_tp.coordinator.settings import Settings
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.jobs import CHAT

GRADER = StringCheck(name="right", input="{{sample.output_text}}", reference="yes", operation="eq")
HOUR = {"anchor": "created_at", "seconds": 3600}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("y")
    model = write_model(folder / "model")
    with (
        CoordinatorProcess(folder, model_path=model, max_file_bytes=100_000) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.01) as ranks,
        coordinator.client() as http,
    ):
        wait_for(lambda: http.get("/health").json()["trainer"])
        client = openai.OpenAI(
            base_url=f"{coordinator.url}/v1", api_key="unused", max_retries=0, _strict_response_validation=True
        )
        yield client, ranks, http, coordinator


def upload(client, content=CHAT, **options):
    return client.files.create(file=("a.jsonl", content), purpose="fine-tune", **options)


def finished(client, job):
    return wait_for(lambda: (j := client.fine_tuning.jobs.retrieve(job.id)).finished_at and j)


def test_every_state_of_a_job_is_a_value_of_the_type():
    """Whatever we call it; a paused job is told apart by a field of our own."""
    allowed = get_args(FineTuningJob.model_fields["status"].annotation)
    link, settings = type("Link", (), {"hello": None}), Settings(instance_dir="i")
    scheduler = type("Scheduler", (), {"running": None, "link": link, "settings": settings})
    for state, kind in itertools.product(State, ("supervised", "dpo", "reinforcement")):
        view = openai_jobs.job_view(new_job("openai", JobSpec(method=kind, grader=GRADER), state), scheduler)
        assert view["status"] in allowed, state
        assert view["paused"] == (state is State.paused)
        FineTuningJob.model_validate(view, strict=True)


def test_a_paused_job_breaks_no_list(stack):
    """A client that checks its types reads it, alone and among others, by /train too under its own name."""
    client, _, http, _ = stack
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="fake", training_file=upload(client).id, hyperparameters={"n_epochs": 2000})
    wait_for(lambda: jobs.retrieve(job.id).status == "running")
    assert not jobs.retrieve(job.id).paused
    jobs.pause(job.id)
    paused = wait_for(lambda: (j := jobs.retrieve(job.id)).paused and j)
    assert paused.status == "queued"
    assert [j.paused for j in jobs.list() if j.id == job.id] == [True]
    assert http.get(f"/train/jobs/{job.id}").json()["state"] == "paused"
    assert list(jobs.list_events(job.id))
    assert jobs.cancel(job.id).status == "cancelled"


@pytest.mark.parametrize("kind", [None, "supervised"])
def test_a_jobs_own_view_makes_it_again(stack, kind):
    """With what is null in it, as model_dump() gives it, and without."""
    client, *_ = stack
    options = {"hyperparameters": {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 0.5}}
    asked = {"method": {"type": kind, kind: options}} if kind else options
    job = finished(
        client, client.fine_tuning.jobs.create(model="fake", training_file=upload(client).id, seed=3, **asked)
    )
    fields = (
        "model",
        "training_file",
        "validation_file",
        "hyperparameters",
        "method",
        "seed",
        "metadata",
        "integrations",
    )
    for dump in (job.model_dump(exclude_none=True), job.model_dump()):
        again = client.fine_tuning.jobs.create(**{name: dump[name] for name in fields if name in dump})
        assert (again.hyperparameters, again.method, again.seed) == (job.hyperparameters, job.method, job.seed)
        finished(client, again)


def method(kind, **options):
    return {"method": {"type": kind, kind: {"hyperparameters": options}}}


REFUSED = {
    "two values": (
        {"hyperparameters": {"n_epochs": 1}} | method("supervised", n_epochs=2), "hyperparameters.n_epochs", "1 beside 2"
    ),
    "integrations": ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations", "service.writers"),
    "reinforcement": ({"method": {"type": "reinforcement"}}, "method.reinforcement", "it with a grader"),
    "its server": (
        {"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method.type", "service.server_url"
    ),
    "another method": ({"method": {"type": "ppo"}}, "method.type", "one of supervised, dpo, reinforcement"),
    "its options": (
        {"method": {"type": "dpo", "reinforcement": {"grader": {}}}}, "method.reinforcement", "only method.dpo"
    ),
    "lr": ({"hyperparameters": {"lr": 1e-5}}, "hyperparameters.lr", "learning_rate_multiplier"),
    "epochs": ({"hyperparameters": {"epochs": 2}}, "hyperparameters.epochs", "n_epochs"),
    "in method": (
        method("dpo", learning_rate=1), "method.dpo.hyperparameters.learning_rate", "learning_rate_multiplier"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_says_what_can(stack, name):
    """The field, and what to write in its place."""
    client, *_ = stack
    body, field, words = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(model="fake", training_file=upload(client).id, extra_body=body)
    assert error.value.param == field
    assert words in error.value.message


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"lr": 1e-5}, "lr", "learning_rate_scale"),
        ({"learning_rate": 1e-5}, "learning_rate", "learning_rate_scale"),
        ({"n_epochs": 2}, "n_epochs", "expected epochs"),
        ({"samples": [{"input_ids": [1, 2]}]}, "samples[0].input_ids", "context_ids and continuation_ids"),
    ],
)
def test_names_of_other_tools_are_recognised(stack, body, field, words):
    """By POST /train too."""
    _, _, http, _ = stack
    error = http.post("/train", json=body).json()["error"]
    assert (error["field"], words in error["message"]) == (field, True), error


def test_parallel_tool_calls_is_taken_by_both_apis(stack):
    """It says how a model was to answer, and stands in OpenAI's lines."""
    client, _, http, _ = stack
    line = CHAT.rstrip()[:-1] + b', "parallel_tool_calls": false}'
    assert http.post("/train", content=line).status_code == 202
    assert http.post("/train", content=b'{"samples": [' + line + b"]}").status_code == 202
    job = client.fine_tuning.jobs.create(model="fake", training_file=upload(client, line).id)
    assert finished(client, job).status == "succeeded"


def test_an_unknown_cursor_begins_no_list_again(stack):
    """It is refused in every list; a known one goes on."""
    client, _, http, _ = stack
    file = upload(client)
    job = finished(client, client.fine_tuning.jobs.create(model="fake", training_file=file.id))
    lists = (
        "/v1/files",
        "/v1/fine_tuning/jobs",
        "/train/jobs",
        "/checkpoints",
        f"/v1/fine_tuning/jobs/{job.id}/checkpoints",
    )
    for path in lists:
        assert http.get(path).json()["data"], path
        newest = http.get(path).json()["data"][0]["id"]
        assert newest not in [entry["id"] for entry in http.get(f"{path}?after={newest}").json()["data"]]
        answer = http.get(f"{path}?after=no-such-id")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after"), path
    events = f"/v1/fine_tuning/jobs/{job.id}/events"
    newest = int(http.get(events).json()["data"][0]["id"].removeprefix("ftevent-"))
    for after in ("x", "ftevent-x", f"ftevent-{newest + 1}", "ftevent-0", "ftevent--1", "ftevent-" + "9" * 30):
        assert http.get(f"{events}?after={after}").status_code == 400, after
    assert http.get(f"{events}?after=ftevent-{newest}&limit=1").json()["data"][0]["id"] != f"ftevent-{newest}"


def test_lists_are_filtered_by_what_openai_knows(stack):
    """A purpose that no file here has gives an empty list; metadata=null gives the jobs without metadata."""
    client, _, http, _ = stack
    file = upload(client)
    assert file.id in [each.id for each in client.files.list()]
    assert list(client.files.list(purpose="batch")) == []
    assert http.get("/v1/files?purpose=assistants_output").json()["data"] == []
    create = client.fine_tuning.jobs.create
    bare, tagged = (create(model="fake", training_file=file.id, metadata=tag) for tag in (None, {"a": "b"}))
    found = [job["id"] for job in http.get("/v1/fine_tuning/jobs?metadata=null&limit=100").json()["data"]]
    assert bare.id in found
    assert tagged.id not in found


def test_result_files_have_openais_columns(stack):
    """The notebooks' way: result_files, then the content of the first; validation stands in the row of its step."""
    client, *_ = stack
    ids = [upload(client, CHAT * 4).id, upload(client).id]
    job = client.fine_tuning.jobs.create(
        model="fake", training_file=ids[0], validation_file=ids[1], hyperparameters={"n_epochs": 5, "batch_size": 1}
    )
    if not job.finished_at:
        assert job.result_files == []
    job = finished(client, job)
    (name,) = job.result_files
    content = client.files.content(name).read()
    assert content.splitlines()[0] == b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    events = [e.data for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"][::-1]
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert [float(row["train_loss"]) for row in rows] == [data["train_loss"] for data in events if "train_loss" in data]
    valid = {data["step"]: data["valid_loss"] for data in events if "valid_loss" in data}
    assert {int(row["step"]): float(row["valid_loss"]) for row in rows if row["valid_loss"]} == valid
    assert len(valid) == 10
    shown = client.files.retrieve(name)
    assert (shown.purpose, shown.filename, shown.bytes) == ("fine-tune-results", "step_metrics.csv", len(content))
    with pytest.raises(openai.BadRequestError, match="result file"):
        client.files.delete(name)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-results-000000000000000000000000")


def test_the_model_is_listed(stack):
    """On the coordinator's port, under the name that jobs must have."""
    client, *_ = stack
    (model,) = client.models.list()
    assert model.id == client.models.retrieve(model.id).id == "fake"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("a/b")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("checkpoint", ["ftckpt-1", "/ckpt/step/1"])
def test_permissions_say_what_to_do(stack, checkpoint):
    """Every call of the SDK: a clear refusal."""
    permissions = stack[0].fine_tuning.checkpoints.permissions
    for call in (
        lambda: permissions.create(checkpoint, project_ids=["p"]),
        lambda: list(permissions.list(checkpoint, project_id="p", order="descending", limit=3)),
        lambda: permissions.delete("cp_1", fine_tuned_model_checkpoint=checkpoint),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            call()
        assert (error.value.code, error.value.param) == ("unsupported", "permissions")
        assert "service.token_file" in error.value.message


def form(http, content=CHAT, **fields):
    return http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"} | fields)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"bogus": "1"}, "bogus", "unknown form field"),
        ({"purpose": ["fine-tune", "fine-tune"]}, "purpose", "twice"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]", "nothing"),
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]", "nothing"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after[anchor]", "'now'"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after[seconds]", "3600"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
            "expires_after[seconds]",
            "2592000",
        ),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e4"}, "expires_after[seconds]", "'1e4'"),
        ({"expires_after": "3600"}, "expires_after", "unknown form field"),
        ({"expires_after[days]": "1"}, "expires_after[days]", "unknown form field"),
    ],
)
def test_every_form_field_is_honoured_or_refused(stack, fields, param, words):
    """By its name; nothing of a refused form is stored."""
    _, _, http, coordinator = stack
    before = len(list((coordinator.folder / "state" / "files").iterdir()))
    answer = form(http, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert words in answer.json()["error"]["message"]
    assert len(list((coordinator.folder / "state" / "files").iterdir())) == before


def test_expiry_is_shown(stack):
    """As the moment at which the file is removed."""
    client, *_ = stack
    file = upload(client, expires_after=HOUR)
    assert file.expires_at == client.files.retrieve(file.id).expires_at == file.created_at + 3600
    assert upload(client).expires_at is None


def parts_of(content, size):
    return [content[start : start + size] for start in range(0, len(content), size)]


def files_on_disk(coordinator):
    return sorted(path.name for path in (coordinator.folder / "state" / "files").iterdir())


def test_a_file_in_parts(stack):
    """Begun, added to in any order, completed in the asked one; it trains as any other file, and no part is left."""
    client, _, _, coordinator = stack
    content = CHAT * 3
    before = files_on_disk(coordinator)
    begun = client.uploads.create(
        bytes=len(content), filename="p.jsonl", mime_type="text/jsonl", purpose="fine-tune", expires_after=HOUR
    )
    assert (begun.status, begun.bytes, begun.file) == ("pending", len(content), None)
    pieces = parts_of(content, 50)
    ids = [client.uploads.parts.create(begun.id, data=piece).id for piece in reversed(pieces)][::-1]
    done = client.uploads.complete(begun.id, part_ids=ids, md5=hashlib.md5(content).hexdigest())
    assert (done.status, done.file.bytes, done.file.filename) == ("completed", len(content), "p.jsonl")
    assert done.file.expires_at == done.file.created_at + 3600
    assert client.files.content(done.file.id).read() == content
    assert len(files_on_disk(coordinator)) == len(before) + 1
    job = client.fine_tuning.jobs.create(model="fake", training_file=done.file.id)
    assert finished(client, job).status == "succeeded"
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.uploads.parts.create(begun.id, data=b"x")


def test_a_whole_file_by_the_sdks_own_way(stack, tmp_path):
    """upload_file_chunked, which makes the parts itself."""
    client, *_ = stack
    path = tmp_path / "big.jsonl"
    path.write_bytes(CHAT * 500)
    done = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=20_000)
    assert client.files.content(done.file.id).read() == path.read_bytes()


def test_uploads_that_do_not_fit_together(stack):
    """Each is refused by name; the upload can still be completed or cancelled, and a cancelled one leaves nothing."""
    client, _, http, coordinator = stack
    before = files_on_disk(coordinator)
    begin = {"bytes": 6, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    for change, param in (
        ({"purpose": "batch"}, "purpose"), ({"bytes": 0}, "bytes"), ({"bytes": 10**9}, "bytes"), ({"x": 1}, "x"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
    ):  # fmt: skip
        answer = http.post("/v1/uploads", json=begin | change)
        assert (answer.status_code in (400, 413), answer.json()["error"]["param"]) == (True, param), change
    one = client.uploads.create(**begin)
    a, b = (client.uploads.parts.create(one.id, data=data).id for data in (b"abc", b"def"))
    with pytest.raises(openai.BadRequestError, match="9 bytes"):
        client.uploads.parts.create(one.id, data=b"ghi")
    for part_ids, md5 in (([a], None), ([a, a], None), ([a, "part_x"], None), ([a, b], "0" * 32)):
        with pytest.raises(openai.BadRequestError):
            client.uploads.complete(one.id, part_ids=part_ids, **({"md5": md5} if md5 else {}))
    path = f"/v1/uploads/{one.id}/parts"
    assert http.post(path, files={"data": ("x", b"")}).json()["error"]["param"] == "data"
    assert http.post(path, files={"data": ("x", b"x")}, data={"y": "1"}).json()["error"]["param"] == "y"
    assert client.uploads.cancel(one.id).status == "cancelled"
    assert files_on_disk(coordinator) == before
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.uploads.complete(one.id, part_ids=[a, b])
    with pytest.raises(openai.NotFoundError, match="begin again"):
        client.uploads.cancel("upload_none")


def test_no_more_files_than_allowed_at_once(tmp_path):
    """Also if all of them arrive at the same moment."""
    with CoordinatorProcess(tmp_path, max_files=3) as coordinator, coordinator.client() as http:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            content = CHAT * 10_000
            answers = list(pool.map(lambda _: form(http, content).status_code, range(12)))
        assert sorted(set(answers)) == [200, 400]
        assert answers.count(200) == len(http.get("/v1/files").json()["data"]) == len(files_on_disk(coordinator)) == 3


def test_a_file_object_is_valid_whatever_its_purpose():
    """The SDK's own list of purposes has ours."""
    assert {"fine-tune", "fine-tune-results"} <= set(get_args(FileObject.model_fields["purpose"].annotation))
