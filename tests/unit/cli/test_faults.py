"""What a user, a file or another program can get wrong ends ``apollo-tp`` in one sentence, never in a traceback."""

import json
import os
import subprocess
import sys

import pytest

from apollo_tp.cli import client
from apollo_tp.cli.main import main
from tests.support.http_server import served

NOBODY = "http://127.0.0.1:9"
STATUS = {
    "trainer": {"connected": True, "weight_version": 3, "model": "/models/[bold]x[/y]", "num_ranks": 2, "optimizer": "a",
                "served_model_names": ["m"], "vocab_size": 4, "max_sequence_tokens": 2, "attention_window": 0},
    "running": None, "queue": [], "unsaved": False, "weight_version": 3, "data": [{"logprob": -1.0}],
}  # fmt: skip
JOB = {"id": "job-1", "state": "succeeded", "step": 1, "total_steps": 1, "loss": 0.5, "tokens": 3, "wanted": None}
EVENT = {"id": 1, "type": "message", "level": "info", "message": "hello", "data": {}}


@pytest.fixture
def coordinator():
    """One that gives STATUS to every request."""
    with served(lambda *_: (200, STATUS)) as url:
        yield url


def shell(*arguments, redirect="", **environment):
    """The program as a process of its own, its streams redirected by a shell."""
    command = [
        "bash",
        "-c",
        f'"$@" {redirect}',
        "bash",
        sys.executable,
        "-m",
        "apollo_tp.cli.main",
        *map(str, arguments),
    ]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=60, check=False)


BAD_LINES = {
    "NaN": b'{"text": "abc", "weight": NaN}',
    "-Infinity": b'{"text": "abc", "weight": -Infinity}',
    "no double": b'{"text": "abc", "weight": 1e999}',
    "no double below zero": b'{"text": "abc", "weight": -1e400}',
    "5,000 digits": b'{"context_ids": [1], "continuation_ids": [1' + b"0" * 5000 + b"]}",
    "5,000 digits and a fraction": b'{"text": "abc", "weight": 1' + b"0" * 5000 + b".5}",
    "first half of a surrogate": b'{"text": "smile \\ud83d"}',
    "second half of a surrogate": b'{"text": "smile \\ude00"}',
    "half a surrogate in a name": b'{"\\ud83d": 1}',
    "half a surrogate as bytes": b'{"text": "\xed\xa0\xbd"}',
    "3,000 brackets": b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "3,000 open brackets": b'{"text": ' + b"[" * 3000,
    "3,000 braces": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "array": b"[1]",
    "string": b'"abc"',
    "number": b"1",
    "null": b"null",
    "latin-1": '{"text": "Grüße"}'.encode("latin-1"),
    "utf-16": '{"text": "x"}'.encode("utf-16"),
    "NUL": b'{"text": "a\0"}',
    "control-Z": b"\x1a",
    "two objects": b'{"text": "x"}\r{"text": "y"}',
    "one half": b'{"text": "x"',
    "no-break space": b"\xc2\xa0",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, capsys, line):
    """With its file and number, before anybody is asked; blank lines count."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
    assert main(["train", str(path), "--url", NOBODY]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"apollo-tp: {path}, line 3: got ")
    assert "expected one object in UTF-8" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_samples_is_named(tmp_path, capsys, content):
    """Empty, blank, and with a byte order mark alone."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert main(["train", str(path), "--url", NOBODY]) == 1
    assert f"{path}, line 1: got no samples" in capsys.readouterr().err


def test_a_sample_that_the_coordinator_refuses_is_named_by_its_line(tmp_path, capsys):
    """It counts samples, the user counts lines; a byte order mark and numbers of any size arrive as they are."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\n{"text": 10000000000000000000000000.10}\n')
    bodies, fields = [], []

    def respond(_, body):
        bodies.append(body)
        return 400, {"error": {"message": "samples[1].text: got a number", "field": fields.pop()}}

    with served(respond) as url:
        for field, where in [("samples[1].text", f"{path}, line 3: 400: samples[1]"), ("samples[7]", "apollo-tp: 400: "),
                             ("epochs", "apollo-tp: 400: "), (None, "apollo-tp: 400: ")]:  # fmt: skip
            fields.append(field)
            assert main(["train", str(path), "--url", url, "--epochs", "2"]) == 1
            assert where in capsys.readouterr().err
    samples = [{"text": "x"}, {"text": 10000000000000000000000000.10}]
    assert bodies[0] == {"epochs": 2, "metadata": {"name": "data.jsonl"}, "samples": samples}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
def test_a_terminal_of_any_encoding_shows_the_status(coordinator, encoding):
    """What it has no character for is shown otherwise; brackets in a model's name are no markup."""
    done = shell("status", "--url", coordinator, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "/models/[bold]x[/y] on 2 ranks" in done.stdout.decode(encoding)


def test_text_of_the_coordinator_is_shown_in_ascii():
    """An event's message, with characters that ASCII lacks and half a surrogate, which not even UTF-8 has."""
    page = {"data": [EVENT | {"message": "grün \ud83d"}]}
    with served(lambda *_: (200, page)) as url:
        done = shell("events", "job-1", "--url", url, PYTHONIOENCODING="ascii")
    assert b"Traceback" not in done.stderr
    with served(lambda *_: (200, {"data": [EVENT | {"message": "grün"}]})) as url:
        done = shell("events", "job-1", "--url", url, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"     1 info  gr\\xfcn\n")


@pytest.mark.parametrize(
    ("redirect", "status"), [(">/dev/full", 2), (">&-", 0), (">&- 2>&-", 0), ("| head -c 0", 0)]
)  # fmt: skip
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_standard_output_that_takes_nothing(coordinator, form, redirect, status):
    """A full disk, closed streams, and a reader that has gone."""
    done = shell("status", "--url", coordinator, *form, redirect=redirect)
    assert done.returncode == status
    assert done.stderr == (b"apollo-tp: [Errno 28] No space left on device\n" if status else b"")


def test_a_help_text_that_cannot_be_written():
    """Is an error in one line, as any other output."""
    for arguments in (("--help",), ("train", "-h")):
        done = shell(*arguments, redirect=">/dev/full")
        assert (done.returncode, done.stderr) == (2, b"apollo-tp: [Errno 28] No space left on device\n")


def test_an_error_without_standard_error():
    """Is not written to standard output, of which a program reads JSON."""
    done = shell("status", "--json", "--url", NOBODY, redirect="2>&-")
    assert (done.returncode, done.stdout) == (3, b"")


def test_closed_standard_input():
    """As the file of samples."""
    done = shell("train", "-", "--url", NOBODY, redirect="<&-")
    assert (done.returncode, done.stderr) == (2, b"apollo-tp: [Errno 9] Bad file descriptor\n")


@pytest.mark.parametrize(
    "answer",
    [b"<html></html>", b"", b"\xff", b"[]", b"null", b"{}", b'{"trainer": 1}', b"[" * 5000, b'"\xed\xa0\xbd"',
     json.dumps(STATUS | {"trainer": {"connected": True, "weight_version": "x"}}).encode()],
)  # fmt: skip
def test_a_server_that_is_no_coordinator(answer, capsys):
    """Of another program, or of another version, whose fields are others."""
    with served(lambda *_: (200, answer)) as url:
        assert main(["status", "--url", url]) == 3
    assert "expected the JSON of a coordinator" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"<html></html>", b"[]", b'{"error": 1}', b'{"error": {}}', b"[" * 5000, b"\xff"])
def test_an_error_of_another_form(answer, capsys):
    """Is shown as it is, cut."""
    with served(lambda *_: (502, answer)) as url:
        assert main(["status", "--url", url]) == 1
    assert "apollo-tp: 502: " in capsys.readouterr().err


def test_an_answer_that_cannot_be_decompressed(capsys):
    """httpx's error for it is none of the transport."""

    def respond(handler, _):
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", "3")
        handler.end_headers()
        handler.wfile.write(b"abc")
        return None, None

    with served(respond) as url:
        assert main(["status", "--url", url]) == 3
    assert "no coordinator answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer", [b"<html></html>", b"{}", b'{"choices": []}', b'{"choices": [{"prompt_logprobs": [null, {"1": {}}]}]}',
               b'{"choices": [{"prompt_logprobs": [null, {"9": {"logprob": 0}}]}]}']
)  # fmt: skip
def test_compare_with_a_server_that_is_no_vllm(answer, capsys):
    """One that answers 200 with something else."""

    def respond(handler, _):
        return 200, answer if "/v1/" in handler.path else STATUS

    with served(respond) as url:
        assert main(["compare", "--url", url, "--server", url]) == 1
    assert "expected the log-probabilities of 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (("status", "--url", "http://a..b:1"), 2),
        (("status", "--url", "http://" + "a" * 70), 2),
        (("status", "--url", "http://h:-1"), 3),
        (("status", "--url", "http://"), 3),
        (("status", "--url", "http://h/\udcff"), 2),
        (("status", "--url", "tcp://127.0.0.1:9", "--key", "FILE"), 2),
        (("status", "--url", NOBODY, "--token-file", "FILE"), 2),
        (("status", "--url", NOBODY, "--token-file", "/"), 2),
        (("train", "/"), 2),
        (("train", "FILE", "--learning-rate-scale", "nan"), 2),
        (("train", "FILE", "--learning-rate-scale", "1e999"), 2),
        (("train", "FILE", "--epochs", "1" + "0" * 5000), 2),
        (("train", "FILE", "--truncate", "middle"), 2),
        (("compare", "--at-most", "nan"), 2),
        (("compare", "--server", "http://a..b", "--url", "STATUS"), 1),
        (("keys", "FILE"), 2),
        (("status", "--nonsense"), 2),
    ],
)
def test_options(tmp_path, capsys, coordinator, options, status):
    """A value that no library below takes, with the exit status of its kind."""
    file = tmp_path / "file"
    file.write_bytes(b"\xff\xfe\0")
    found = {"FILE": str(file), "STATUS": coordinator}
    assert main([found.get(option, option) for option in options]) == status
    assert capsys.readouterr().err.strip()


def test_keys_that_are_none_and_addresses_that_zmq_refuses(tmp_path, capsys):
    """Keys of other lengths; an address without a port."""
    assert main(["keys", str(tmp_path)]) == 0
    good, bad = tmp_path / "clients/client.key_secret", tmp_path / "bad.key_secret"
    bad.write_text('metadata\ncurve\n    public-key = "abc"\n    secret-key = "x"\n')
    for key, address in [(good, "tcp://nonsense"), (good, "tcp://"), (bad, "tcp://127.0.0.1:9")]:
        assert main(["status", "--url", address, "--key", str(key)]) == 2
        assert f"{address}, key {key}: " in capsys.readouterr().err


@pytest.mark.parametrize("token", ["grün", "a\x07b", "\udcff"])
@pytest.mark.parametrize("variable", ["APOLLO_TP_TOKEN", "VLLM_API_KEY"])
def test_a_token_that_no_header_carries(monkeypatch, coordinator, capsys, token, variable):
    """Is refused by the name of its variable, and not shown."""
    monkeypatch.setenv(variable, token)
    assert main(["compare", "--url", coordinator, "--server", NOBODY]) == 2
    error = capsys.readouterr().err
    assert f"${variable}: got a token with other characters" in error
    assert token.encode("utf-8", "backslashreplace").decode() not in error


@pytest.mark.parametrize("job", ["a b", "a?x=1", "../status", "\udcff", "é", "%", "#"])
def test_an_id_is_one_part_of_the_path(job, capsys):
    """Whatever was typed, nothing but a job is asked for."""
    paths = []
    with served(lambda handler, _: (paths.append(handler.path), (404, {"error": {"message": "none"}}))[1]) as url:
        assert main(["cancel", job, "--url", url]) == 1
    assert paths[0].startswith("/train/jobs/")
    assert paths[0].endswith("/cancel")
    assert paths[0].count("/") == 4
    assert "?" not in paths[0]


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"url": 1, "pid": 1}', '{"url": "http://x", "pid": "1"}'])
def test_a_malformed_coordinator_file(tmp_path, monkeypatch, capsys, content):
    """Is as none: the default address is asked."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server/coordinator.json").write_text(content)
    tmp_path.chmod(0o700)
    monkeypatch.setenv("APOLLO_TP_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("apollo_tp.cli.access.DEFAULT_URL", NOBODY)
    assert main(["status"]) == 3
    assert "no coordinator answers" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"served_model_names": []}, {"vocab_size": 0}, {"vocab_size": None}])
def test_compare_with_a_trainer_that_lacks_something(change, capsys):
    """A name to ask the server for, or a vocabulary."""
    with served(lambda *_: (200, STATUS | {"trainer": STATUS["trainer"] | change})) as url:
        assert main(["compare", "--url", url, "--server", url]) == 3
    assert next(iter(change)) in capsys.readouterr().err


def streaming(parts):
    """A coordinator whose event streams send ``parts``, one each, and then break off; and the Last-Event-IDs that it got."""
    seen = []

    def respond(handler, _):
        if not handler.path.endswith("/events"):
            return 200, JOB
        seen.append(handler.headers["Last-Event-ID"])
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(parts[min(len(seen), len(parts)) - 1])
        return None, None

    return respond, seen


def lines_of(event):
    return f"id: {event['id']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def test_events_go_on_after_a_stream_that_ended_too_early(monkeypatch, capsys):
    """After the last one that came whole; a comment is nothing."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.01)
    second = lines_of(EVENT | {"id": 2, "message": "again"})
    respond, seen = streaming(
        [lines_of(EVENT) + second[:-20], b": still there\n\n" + second, b"event: end\ndata: {}\n\n"]
    )
    with served(respond) as url:
        assert main(["events", "job-1", "--follow", "--json", "--url", url]) == 0
    shown = [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    assert (shown, seen) == ([1, 2], [None, "1", "2"])


def test_a_coordinator_that_only_breaks_off_is_given_up(monkeypatch, capsys):
    """After the time that a restart may take."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(client, "RECONNECT_SECONDS", 0.3)
    respond, seen = streaming([b""])
    with served(respond) as url:
        assert main(["events", "job-1", "--follow", "--url", url]) == 3
    assert len(seen) > 1
    assert "no coordinator answers (the events ended before the job)" in capsys.readouterr().err


@pytest.mark.parametrize("part", [b"id: 1\nevent: x\ndata: {\n\n", b"id: 1\nevent: x\ndata: []\n\n"])
def test_events_of_another_form(part, capsys):
    """Are no coordinator's."""
    respond, _ = streaming([part])
    with served(respond) as url:
        assert main(["events", "job-1", "--follow", "--url", url]) == 3
    assert "expected the JSON of a coordinator" in capsys.readouterr().err


def test_help_comes_at_once():
    """Under half a second of processor time, without the imports that only calls need."""
    code = "import sys; from apollo_tp.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 0.5
    assert "compare" in done.stdout
    assert not {"torch", "transformers", "vllm", "httpx", "zmq"} & set(done.stdout.replace("'", "").split(", "))
