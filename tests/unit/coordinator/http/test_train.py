"""POST /train and its jobs over real HTTP against a real coordinator process; rank 0 is a fake over a real socket."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi.exceptions import RequestValidationError

from apollo_tp.coordinator.http.app import build_app
from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.errors import error_response
from apollo_tp.coordinator.http.metrics import Metrics
from apollo_tp.coordinator.http.server_metrics import Figures, Mean, parse_server_metrics
from apollo_tp.coordinator.http.service import Service
from apollo_tp.coordinator.http.validation import FileValidation
from apollo_tp.coordinator.jobs.changes import Changes
from apollo_tp.coordinator.jobs.rank_link import RanksGoneError
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.settings import Settings
from apollo_tp.errors import DeadlineError, RankFailedError, RequestError
from tests.support.fakes import VOCAB_SIZE

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


def test_a_job_runs_to_its_end(stack):
    """A waited-for job has trained epochs x batches steps, in order, each once, and its events say so."""
    client, ranks = stack
    samples = [ONE | {"context_ids": [i]} for i in range(5)]
    body = {"samples": samples, "epochs": 2, "batch_size": 2, "wait": True, "learning_rate_scale": 0.5}
    answer = client.post("/train", json=body)
    assert answer.status_code == 200
    job = answer.json()
    assert (job["state"], job["step"], job["total_steps"]) == ("succeeded", 6, 6)
    assert [step for name, step in ranks.applied() if name == job["id"]] == [1, 2, 3, 4, 5, 6]
    sent = [command for command in ranks.commands if getattr(command, "job_id", "") == job["id"]]
    assert [[sample.token_ids[0] for sample in command.samples] for command in sent] == [[0, 1], [2, 3], [4]] * 2
    assert sent[0].samples[0].weights == [0.0, 1.0, 1.0]
    assert sent[0].learning_rate_scale == 0.5
    events = client.get(f"/train/jobs/{job['id']}/events").json()["data"]
    assert [event["data"]["step"] for event in events if event["type"] == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert {event["data"]["gradients"] for event in events if event["type"] == "metrics"} == {"in_backward"}
    assert [event["data"].get("state") for event in events if event["type"] == "state"] == [
        "queued",
        "running",
        "succeeded",
    ]
    assert all(event["time"] > 0 for event in events)


def test_a_seed_shuffles_each_epoch_differently(stack):
    """With a seed, every epoch trains each sample once, and two epochs have different orders."""
    client, ranks = stack
    samples = [ONE | {"context_ids": [i]} for i in range(16)]
    job = client.post(
        "/train", json={"samples": samples, "epochs": 2, "batch_size": 16, "seed": 7, "wait": True}
    ).json()
    sent = [c for c in ranks.commands if getattr(c, "job_id", "") == job["id"]]
    first, second = ([sample.token_ids[0] for sample in command.samples] for command in sent)
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    assert first != list(range(16))


def test_max_steps_ends_a_job_early(stack):
    """max_steps bounds the optimizer steps whatever the epochs."""
    client, _ = stack
    job = client.post("/train", json=ONE | {"epochs": 100, "max_steps": 3, "wait": True}).json()
    assert (job["step"], job["total_steps"]) == (3, 3)


REFUSED = {
    "malformed JSON": (b'{"context_ids": [1', 400, "body"),
    "not an object": (b"[]", 400, "body"),
    "not UTF-8": (b'{"text": "\xff"}', 400, "body"),
    "unknown field": ({"contxt_ids": [1]}, 400, "contxt_ids"),
    "unknown field in a sample": ({"samples": [ONE, {"txt": "x"}]}, 400, "samples[1].txt"),
    "wrong type": ({"context_ids": "x", "continuation_ids": [1]}, 400, "context_ids"),
    "wrong element type": ({"context_ids": [1.5], "continuation_ids": [1]}, 400, "context_ids[0]"),
    "bool for int": (ONE | {"epochs": True}, 400, "epochs"),
    "token beyond the vocabulary": ({"context_ids": [VOCAB_SIZE], "continuation_ids": [1]}, 400, "context_ids[0]"),
    "negative token": ({"context_ids": [-1], "continuation_ids": [1]}, 400, "context_ids[0]"),
    "second sample's token": (
        {"samples": [ONE, {"continuation_ids": [1, 5000]}]},
        400,
        "samples[1].continuation_ids[1]",
    ),
    "empty continuation": ({"context_ids": [1], "continuation_ids": []}, 400, "continuation_ids"),
    "missing continuation": ({"context_ids": [1]}, 400, "continuation_ids"),
    "nothing to predict": ({"continuation_ids": [1]}, 400, "continuation_ids"),
    "too long": ({"context_ids": [1] * 256, "continuation_ids": [1]}, 400, "continuation_ids"),
    "no data": ({}, 400, "body"),
    "two forms": (ONE | {"text": "x"}, 400, "body"),
    "samples and a sample": (ONE | {"samples": [ONE]}, 400, "context_ids"),
    "no samples": ({"samples": []}, 400, "samples"),
    "no epochs": (ONE | {"epochs": 0}, 400, "epochs"),
    "negative scale": (ONE | {"learning_rate_scale": -1}, 400, "learning_rate_scale"),
    "infinite scale": (json.dumps(ONE)[:-1].encode() + b', "learning_rate_scale": 1e999}', 400, None),
    "unknown truncation": (ONE | {"truncate": "middle"}, 400, "truncate"),
    "text without a tokenizer": ({"text": "x"}, 400, "text"),
    "over-large": (b" " * 200_001, 413, "body"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_say_field_got_and_expected(stack, name):
    """A refused request is a 4xx with field, got and expected, and nothing of it reaches the ranks or the queue."""
    client, ranks = stack
    body, status, field = REFUSED[name]
    before = (len(ranks.commands), len(client.get("/train/jobs?limit=100").json()["data"]))
    answer = client.post("/train", content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["got"]
    assert error["expected"]
    assert error["message"]
    if field is not None:
        assert error["field"] == error["param"] == field
    assert (len(ranks.commands), len(client.get("/train/jobs?limit=100").json()["data"])) == before


@pytest.mark.parametrize(
    ("method", "path", "name", "known"),
    [
        ("POST", "/train?dryrun=true", "dryrun", "one of dry_run, wait"),
        ("POST", "/train?dry_run=true&epochs=3", "epochs", "one of dry_run, wait"),
        ("POST", "/train?dry_run[]=true", "dry_run[]", "one of dry_run, wait"),
        ("POST", "/train/score?dry_run=true", "dry_run", "none"),
        ("POST", "/checkpoint?wiat=", "wiat", "one of wait"),
        ("GET", "/train/jobs?offset=3", "offset", "one of after, limit"),
        ("HEAD", "/train/jobs?offset=3", None, None),
        ("GET", "/train/jobs/x/events?from=3", "from", "one of stream, after, limit"),
        ("POST", "/train/jobs/x/cancel?now=1", "now", "none"),
        ("GET", "/?x", "x", "none"),
    ],
)
def test_an_unknown_query_parameter_is_refused(stack, method, path, name, known):
    """A misspelt dry_run must not train: 400 with the names that the route knows, and nothing is queued or sent."""
    client, ranks = stack
    before = (len(ranks.commands), len(client.get("/train/jobs?limit=100").json()["data"]))
    answer = client.request(method, path, **({"json": ONE} if method == "POST" else {}))
    assert answer.status_code == 400, answer.text
    if name is not None:
        error = answer.json()["error"]
        assert (error["field"], error["got"], error["expected"]) == (name, "an unknown query parameter", known)
    assert (len(ranks.commands), len(client.get("/train/jobs?limit=100").json()["data"])) == before


def test_every_operation_refuses_an_unknown_query_parameter(stack):
    """Whichever routes there are: none forgets it. The name is refused before anything else of the request is looked at."""
    client, _ = stack
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            answer = client.request(method, f"{path.replace('{', '').replace('}', '')}?surplus=1")
            error = answer.json()["error"]
            assert (answer.status_code, error["field"], error["param"]) == (400, "surplus", "surplus"), (method, path)


@pytest.mark.parametrize(
    ("query", "field", "got", "expected"),
    [
        ("/train/jobs?limit=0", "limit", "'0'", "greater than or equal to 1"),
        ("/train/jobs?limit=101", "limit", "'101'", "less than or equal to 100"),
        ("/train/jobs?limit=many", "limit", "'many'", "a valid integer"),
        ("/train/jobs/x/events?stream=perhaps", "stream", "'perhaps'", "a valid boolean"),
        ("/train/jobs/x/events?stream=", "stream", "''", "a valid boolean"),
        ("/v1/files?order=up", "order", "'up'", "'desc' or 'asc'"),
        ("/v1/fine_tuning/jobs?metadata[a=1", "metadata", "'metadata[a'", "metadata[KEY]=VALUE"),
    ],
)
def test_a_wrong_query_says_field_got_and_expected(stack, query, field, got, expected):
    """In the form of all errors."""
    client, _ = stack
    answer = client.get(query)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"]) == (400, f"{field}: got {got}, expected {expected}")
    assert (error["field"], error["param"], error["got"], error["expected"]) == (field, field, got, expected)


def test_an_empty_query_parameter_is_the_default(stack):
    """httpx sends None as one. An empty flag is not false, which would train where a dry run was meant."""
    client, _ = stack
    for path in ("/train/jobs", "/v1/files", "/checkpoints"):
        assert client.get(path, params={"after": None, "limit": None}).json() == client.get(path).json()
    assert client.get("/v1/files?purpose=&order=").status_code == 200
    before = client.get("/train/jobs").json()
    assert client.post("/train?dry_run=", json=ONE).status_code == 400
    assert client.get("/train/jobs").json() == before


def test_documented_query_parameters_are_taken(stack):
    """Each that /openapi.json names; what has no route is 404 or 405 whatever its query."""
    client, _ = stack
    values = {"limit": "2", "after": "", "order": "asc", "purpose": "fine-tune", "metadata": None, "first": "1"}
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for parameter in operations.get("get", {}).get("parameters", []):
            if parameter["in"] == "query":
                name = parameter["name"]
                query = f"{name}={values.get(name, 'false')}" if name != "metadata" else "metadata[run]=1"
                answer = client.get(f"{path.replace('{job_id}', 'x')}?{query}")
                if "permissions" in path:
                    assert answer.json()["error"]["code"] == "unsupported", (path, query)
                    continue
                assert answer.status_code == (404 if "{job_id}" in path else 200), (path, query)
    assert client.get("/nope?x=1").status_code == 404
    assert client.put("/train?x=1").status_code == 405


def test_a_chunked_body_is_not_collected(stack):
    """Without a Content-Length the limit still holds: 413, and 100 MB sent do not become 100 MB held."""
    client, ranks = stack
    pid = json.loads((Path(ranks.socket_path).parent / "coordinator.json").read_text())["pid"]

    def peak_bytes():
        return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])

    before = peak_bytes()
    assert client.post("/train", content=(b" " * 100_000 for _ in range(1000))).status_code == 413
    assert peak_bytes() - before < 30_000_000


def test_truncation_is_explicit(stack):
    """left keeps the end, right keeps the beginning; right may leave nothing to learn, which is refused."""
    client, _ = stack
    long = {"context_ids": [1] * 300, "continuation_ids": [2, 3]}
    shown = client.post("/train?dry_run=true", json=long | {"truncate": "left"}).json()["samples"][0]
    assert shown["token_ids"] == [1] * 254 + [2, 3]
    assert shown["weights"] == [0.0] * 254 + [1.0, 1.0]
    refused = client.post("/train?dry_run=true", json=long | {"truncate": "right"})
    assert refused.status_code == 400
    assert "none can be learned" in refused.json()["error"]["got"]


def test_dry_run_trains_nothing(stack):
    """A dry run shows tokens and weights, and makes no job."""
    client, _ = stack
    before = client.get("/train/jobs").json()["data"]
    shown = client.post("/train?dry_run=true", json=ONE | {"epochs": 3}).json()
    assert shown["samples"][0] == {"token_ids": [1, 2, 3, 4], "weights": [0.0, 0.0, 1.0, 1.0], "tokens": None}
    assert (shown["num_tokens"], shown["num_loss_tokens"], shown["total_steps"]) == (4, 2, 3)
    assert client.get("/train/jobs").json()["data"] == before


def test_unknown_things_are_404_and_405_with_bodies(stack):
    """Errors of routing have the same body as all others."""
    client, _ = stack
    for method, path, status in [("GET", "/nope", 404), ("PUT", "/train", 405), ("GET", "/train/jobs/x", 404),
                                 ("POST", "/train/jobs/x/cancel", 404), ("GET", "/checkpoint/x", 404)]:  # fmt: skip
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_another_sites_page_cannot_start_training(stack):
    """A request with a foreign Origin is refused: a browser on this machine is no way in."""
    client, _ = stack
    assert client.post("/train", json=ONE, headers={"Origin": "https://evil.example"}).status_code == 403


def test_an_unforeseen_error_has_an_id_that_the_log_has(tmp_path, caplog):
    """500 in JSON, logged once with its traceback, and raised no further; other errors are JSON as ever."""

    async def get(path):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get(path)

    store = Store(tmp_path)
    saver = SimpleNamespace(on_finished=[])
    scheduler = SimpleNamespace(link=SimpleNamespace(weight_version=7), on_step=[], on_evaluation=[], saver=saver)
    service = Service(Settings(instance_dir=""), store, scheduler, Changes(), "", None)
    app = build_app(service, Access([]), Metrics(scheduler, store, service.latency), FileValidation(service))
    store.files = lambda: 1 / 0
    answer = asyncio.run(get("/v1/files"))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.headers["x-apollo-weight-version"]) == (500, "internal", "7")
    (record,) = [record for record in caplog.records if record.exc_info]
    assert error["id"] in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError
    for path, status in (("/nope", 404), ("/train", 405)):
        answer = asyncio.run(get(path))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, "http")
    assert answer.headers["allow"] == "POST"
    store.close()


@pytest.mark.parametrize(
    ("error", "status", "again"),
    [
        (RequestError("the queue is full", status=429), 429, True),
        (RanksGoneError("no trainer"), 503, True),
        (DeadlineError("late"), 504, False),
        (RankFailedError("a rank raised", rank=1, traceback=""), 500, False),
        (RequestError("wrong"), 400, False),
    ],
)
def test_what_may_be_tried_again_says_when(error, status, again):
    """Clients such as the `openai` package wait for as long as Retry-After says."""
    answer = error_response(error)
    assert (answer.status_code, "retry-after" in answer.headers) == (status, again)


def test_what_fastapi_refuses_has_the_form_of_all_errors():
    """Whoever declares a parameter by FastAPI's own means."""
    answer = error_response(
        RequestValidationError([{"type": "missing", "loc": ("header", "x"), "msg": "Field required"}])
    )
    error = json.loads(answer.body)["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert "Field required" in error["message"]


def test_latency_of_the_server_from_its_metrics():
    """Sums over engines and models, by vLLM's newer names or its older ones; text that is none is no server's."""
    labels = 'engine="{}",model_name="a b, \\"c\\" }}"'
    text = "".join(
        f"# HELP vllm:{name}_seconds Help.\n# TYPE vllm:{name}_seconds histogram\n"
        + "".join(
            f'vllm:{name}_seconds_bucket{{{labels.format(i)},le="+Inf"}} {n}.0\n'
            f"vllm:{name}_seconds_count{{{labels.format(i)}}} {n}.0\nvllm:{name}_seconds_sum{{{labels.format(i)}}} 1.5e-1\n"
            for i, n in enumerate((3, 4))
        )
        for name in ("time_per_output_token", "time_to_first_token")
    )
    text += f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{{labels.format(0)}}} 2.0\n"
    figures = parse_server_metrics(text)
    assert figures == Figures(2.0, Mean(0.3, 7.0), Mean(0.3, 7.0))
    assert parse_server_metrics("") == Figures(None)
    with pytest.raises(ValueError, match="html"):
        parse_server_metrics("<html>not found</html>")


def test_scores_of_samples_in_any_number(stack):
    """In the order given, more than one command takes; nothing is trained, and what is not finite is null."""
    client, ranks = stack
    before = len(ranks.applied())
    samples = [{"context_ids": [1], "continuation_ids": [2] * (1 + i % 3)} for i in range(70)]
    answer = client.post("/train/score", json={"samples": samples}).json()
    assert answer["weight_version"] == before == len(ranks.applied())
    assert [row["weight"] for row in answer["data"]] == [1 + i % 3 for i in range(70)]
    assert answer["data"][1] == {"logprob": pytest.approx(-1.02), "weight": 2.0, "correct": 1.0, "num_tokens": 3}
    ranks.logprob = float("nan")
    try:
        assert client.post("/train/score", json={"samples": samples[:1]}).json()["data"][0]["logprob"] is None
    finally:
        ranks.logprob = -0.5
    for body, field in (({}, "samples"), ({"samples": []}, "samples"), ({"samples": [{}]}, "samples[0]")):
        refused = client.post("/train/score", json=body)
        assert refused.status_code == 400, refused.text
        assert field in refused.json()["error"]["message"]
