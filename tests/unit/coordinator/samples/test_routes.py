"""The same samples through every route: files of the openai package, POST /train, and the command line."""

import codecs
import gzip
import json

import openai
import pytest

from apollo_tp.cli.main import main
from tests.support.fakes import chat_stack, wait_for

ASKED, ANSWER = {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "I am fine, thanks."}
PLAIN = {"messages": [ASKED, ANSWER]}
SAME = [
    PLAIN,
    {"messages": [ASKED | {"name": None}, ANSWER | {"annotations": [], "audio": None}], "functions": None, "tools": []},
    {"conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "I am fine, thanks."}]},
    {"instruction": "Hello there", "input": "", "output": "I am fine, thanks."},
    {"prompt": [ASKED], "completion": [ANSWER]},
    PLAIN | {"parallel_tool_calls": False, "text": "", "prompt": None},
]
CONTENT = codecs.BOM_UTF8 + "\r\n".join(json.dumps(sample) for sample in SAME).encode()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with chat_stack(tmp_path_factory.mktemp("routes")) as parts:
        yield parts


def job_of(url, content, method="supervised"):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="fake", training_file=file.id, method={"type": method})
    return wait_for(lambda: (found := client.fine_tuning.jobs.retrieve(job.id)).finished_at and found)


def test_the_forms_of_a_sample_are_the_same_everywhere(stack, tmp_path, capsys):
    """The dry run shows the tokens of what they were converted to; every one is trained."""
    client, ranks, coordinator = stack
    shown = client.post("/train?dry_run=true", json={"samples": SAME}).json()["samples"]
    assert len(shown) == len(SAME)
    assert all(sample == shown[0] for sample in shown)
    for sample in SAME:
        assert client.post("/train?dry_run=true", json=sample).json()["samples"] == shown[:1]
    job = job_of(coordinator.url, CONTENT)
    assert job.status == "succeeded", job.error
    trained = [s.token_ids for c in ranks.commands if getattr(c, "job_id", "") == job.id for s in c.samples]
    assert trained == [shown[0]["token_ids"]] * len(trained)
    assert len(trained) >= len(SAME)
    path = tmp_path / "data.jsonl"
    path.write_bytes(CONTENT)
    assert main(["train", str(path), "--url", coordinator.url, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == shown


BAD = {
    "a field": ([PLAIN, PLAIN | {"x": 1}], 2, "unknown field"),
    "a role": ([PLAIN, PLAIN, {"messages": [{"role": "bot", "content": "x"}, ANSWER]}], 3, "messages[0].role"),
    "a call": ([{"messages": [ASKED, ANSWER | {"function_call": {"name": "f", "arguments": "{}"}}]}], 1, "tool_calls"),
    "a part": (
        [{"messages": [ASKED, ANSWER | {"content": [{"type": "text", "text": "x", "weight": 0}]}]}],
        1,
        "].weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_of_a_sample_has_its_place_everywhere(stack, tmp_path, capsys, name):
    """The line of a file, or the index in a request."""
    client, _, coordinator = stack
    samples, line, words = BAD[name]
    content = "\n".join(map(json.dumps, samples)).encode()
    error = job_of(coordinator.url, content).error
    assert f"line {line}: " in error.message
    assert words in error.message
    answer = client.post("/train", json={"samples": samples})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"].startswith(f"samples[{line - 1}]")
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert main(["train", str(path), "--url", coordinator.url]) == 1
    message = capsys.readouterr().err
    assert f"{path}, line {line}: " in message
    assert words in message


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (CONTENT.decode("utf-8-sig").encode("utf-16"), "UTF-16 text"), (gzip.compress(CONTENT, mtime=0), "gzip"),
        (json.dumps(SAME).encode(), "JSON array"), (json.dumps(PLAIN, indent=2).encode(), "pretty-printed"),
        (b"prompt,completion\na,b", "CSV"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named_everywhere(stack, tmp_path, capsys, content, kind):
    """Before any line of it is read. The command line reads JSON arrays."""
    _, _, coordinator = stack
    message = job_of(coordinator.url, content).error.message
    assert "line 1: " in message
    assert kind in message
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    arguments = ["train", str(path), "--url", coordinator.url]
    if kind == "JSON array":
        assert main([*arguments, "--dry-run"]) == 0
        return
    assert main(arguments) == 1
    assert kind in capsys.readouterr().err


def test_pairs_that_are_the_same_fail_their_job(stack):
    """They would be trained without any effect but that of rounding."""
    _, _, coordinator = stack
    pair = {"input": {"messages": [ASKED]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}
    other = pair | {"non_preferred_output": [{"role": "assistant", "content": "No."}]}
    error = job_of(coordinator.url, "\n".join(map(json.dumps, [other, pair])).encode(), "dpo").error
    assert "line 2: non_preferred_output: got the same tokens" in error.message
