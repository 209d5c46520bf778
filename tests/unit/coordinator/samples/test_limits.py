"""Long texts and large bodies: refused or taken without stopping the coordinator, with little memory."""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest

from apollo_tp.coordinator.jobs.job import Truncate
from apollo_tp.coordinator.samples.body import read_body
from apollo_tp.coordinator.samples.intake import MAX_CUT_FACTOR, Intake, Limits
from apollo_tp.coordinator.samples.schema import Message, SampleBody, ScoreOptions, TrainBody
from apollo_tp.errors import RequestError
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess
from tests.support.served_model import renderer_of
from tests.support.stalls import longest_stall

MIB = 2**20


def peak_mib(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def longest_wait(url, until):
    """The longest time that GET /train/status took until ``until`` was set, in seconds."""
    longest = 0.0
    with httpx.Client(base_url=url, timeout=60) as client:
        while not until.is_set():
            start = time.perf_counter()
            client.get("/train/status").raise_for_status()
            longest = max(longest, time.perf_counter() - start)
            time.sleep(0.01)
    return longest


def refusal(intake, body):
    """The error's code, or None if the sample is taken."""
    try:
        intake.sequences(body, "")
    except RequestError as error:
        return error.code
    return None


IDS = json.dumps({"context_ids": [1], "continuation_ids": [2] * 100}).encode()
BODIES = {
    "one long text": (lambda: b'{"text": "' + b"Hello there " * 300_000 + b'"}', 400, "sequence_too_long"),
    "one long word": (lambda: b'{"text": "' + b"x" * (3 * MIB) + b'"}', 400, "sequence_too_long"),
    "a long message": (
        lambda: json.dumps({"messages": [{"role": "user", "content": "Hello there " * 300_000},
                                         {"role": "assistant", "content": "x"}]}).encode(), 400, "sequence_too_long"),
    "a longer text": (lambda: b'{"text": "' + b"Hello there " * 2_000_000 + b'"}', 413, "sample_too_large"),
    "a text to cut": (
        lambda: b'{"truncate": "left", "text": "' + b"Hello there " * 300_000 + b'"}', 400, "sequence_too_long"),
    "empty samples": (lambda: b'{"samples": [' + b"{}, " * 15_000_000 + b"{}]}", 400, "invalid_request"),
    "many samples": (lambda: b'{"samples": [' + b", ".join([IDS] * 30_000) + b"]}", 202, None),
    "a wrong sample after many": (lambda: b'{"samples": [' + b", ".join([IDS] * 30_000) + b", {}]}", 400, "invalid_request"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_other_clients_are_answered_meanwhile(tmp_path, name):
    """In at most 0.5 s on a busy machine (the interpreter's lock was held for 12 s and more), with memory for the body four
    times and 64 MiB."""
    make, status, code = BODIES[name]
    model = write_model(tmp_path / "model")
    (tmp_path / "service").mkdir()
    with CoordinatorProcess(tmp_path / "service", model_path=model) as coordinator, coordinator.client() as client:
        pid, done, waits = coordinator.process.pid, threading.Event(), []
        content, before = make(), peak_mib(pid)
        thread = threading.Thread(target=lambda: waits.append(longest_wait(coordinator.url, done)))
        thread.start()
        answer = client.post("/train", content=content, headers={"Content-Type": "application/json"}, timeout=60)
        done.set()
        thread.join(60)
        assert answer.status_code == status, answer.text
        assert status == 202 or answer.json()["error"]["code"] == code
        assert waits[0] < 0.5
        assert peak_mib(pid) - before < 64 + 4 * len(content) / MIB
        assert len(list((tmp_path / "service").rglob("*.train"))) == (status == 202)


@pytest.mark.parametrize("truncate", Truncate)
def test_a_text_is_measured_before_it_is_tokenised(tmp_path, truncate, monkeypatch):
    """By its bytes, then in pieces; what may fit is taken, and cut as before."""
    renderer, limit = renderer_of(write_model(tmp_path)), 1000
    intake, encoded, encode = Intake(renderer, Limits(400, limit), truncate), [], renderer._encode
    monkeypatch.setattr(renderer, "_encode", lambda text: encoded.append(len(text)) or encode(text))
    most = limit * (1 if truncate is Truncate.refuse else MAX_CUT_FACTOR)
    for text in ("x" * 3_000_000, "Hello there " * most, "é漢字" * most):
        for body in (
            SampleBody(text=text),
            SampleBody(prompt="a", completion=text),
            SampleBody(prompt=text, completion="a" * 5),
            SampleBody(messages=[Message(role="user", content=text), Message(role="assistant", content="a")]),
        ):
            encoded.clear()
            refused = refusal(intake, body)
            assert refused == "sequence_too_long" or truncate is not Truncate.refuse
            assert refused is None or sum(encoded) < 100 * most
    fits = SampleBody(text="thanks. " * 100)
    assert intake.sequences(fits, "")[0].token_ids[:5] == renderer.encode("thanks. thanks. thanks. thanks.")[:5]


def test_others_run_while_a_text_is_tokenised(tmp_path):
    """The library's encode() keeps the interpreter's lock until it has finished."""
    renderer = renderer_of(write_model(tmp_path))
    longest, seconds = longest_stall(lambda: renderer.encode("Hello there, how are you? " * 40_000))
    assert longest < seconds / 3


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"samples": []}', "samples"),
        (b'{"samples": [], "samples": [{"text": "a"}]}', "samples"),
        (b'{"s\\u0061mples": [{"text": "a"}]}', "samples"),
        (b'{"samples": [{"text": "a"} {"text": "b"}]}', "samples[1]"),
        (b'{"samples": [{"text": "a"},, {"text": "b"}]}', "samples[1]"),
        (b'{"samples": [{"text": "a"}, 3]}', "samples[1]"),
        (b'{"samples": [3, {"text": "a"}]}', "samples[0]"),
        (b'{"samples": ["a"]}', "samples[0]"),
        (b'{"samples": [["a"]]}', "samples[0]"),
        (b'{"samples": [{"text": "a"},]}', "samples[1]"),
        (b'{"samples": [{"text": "a"}], "epochs": "x"}', "epochs"),
        (b'{"samples": [{"text": "a"}]', "body"),
        (b'{"samples": [{"text": "a"}', "body"),
        (b'{"samples": {"text": "a"}}', "samples"),
        (b'{"samples": "x"}', "samples"),
        (b'{"samples": [{"text": "a"}], "x": {"samples": [1]}}', "x"),
        (b'{"samples": [{"text": "a"}, {"text": 3}]}', "samples[1].text"),
        (b'{"samples": [{"text": "a"}, {"text": tru}]}', "samples[1]"),
        (b'{"text": "\\', "body"),
        (b"]]]]", "body"),
        (b"\xff", "body"),
        (b"", "body"),
    ],
)  # fmt: skip
def test_malformed_lists_of_samples_are_refused(body, field):
    """As decoding the body at once would do it."""
    with pytest.raises(RequestError) as error:
        list(read_body(body, TrainBody, 10)[1])
    assert error.value.field == field
    assert error.value.got
    assert error.value.expected


def test_samples_are_found_wherever_they_are():
    """Brackets, quotes and the word itself in strings; white space anywhere; other lists before and after."""
    texts = ["a", '"samples": [', "\\", '\\"}]', "é\n", "]}{["]
    samples = [{"text": text} for text in texts]
    for ensure_ascii in (True, False):
        for indent in (None, 2):
            body = {"metadata": {"samples": "[{"}, "samples": samples, "epochs": 3}
            content = json.dumps(body, ensure_ascii=ensure_ascii, indent=indent).encode()
            read, found = read_body(content, TrainBody, 10)
            assert read.epochs == 3
            assert [sample.text for sample in found] == texts
    assert read_body(b'{"text": "a"}', TrainBody, 10)[1] is None
    assert read_body(b'{"text": "a", "samples": null}', TrainBody, 10)[0].text == "a"
    with pytest.raises(RequestError, match="more than 5 samples"):
        read_body(json.dumps({"samples": samples}).encode(), ScoreOptions, 5)
