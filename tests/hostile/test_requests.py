"""Changed and damaged HTTP requests: no 5xx, the coordinator lives, and nothing is trained that was not accepted."""

from __future__ import annotations

import collections
import concurrent.futures
import http.client
import json
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack
from tests.support.frames import damaged
from tests.support.hostile import damaged_value, raw_request
from tests.support.jobs import CHAT, ONE, ends

pytestmark = pytest.mark.timeout(3600)
THREADS = 4
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am fine", "weight": 1}]
BODIES: list[tuple[str, str, Any]] = [
    ("POST", "/train", {"samples": [ONE, {"messages": CONVERSATION}], "epochs": 2, "learning_rate_scale": 0.5}),
    ("POST", "/train", {"samples": [{"prompt": "a", "completion": "b"}, {"text": "Hello"}], "dry_run": True}),
    ("POST", "/train", {"samples": [{"prompt": "a", "chosen": "b", "rejected": "c"}], "method": "dpo", "beta": 0.1}),
    ("POST", "/train/score", {"samples": [ONE]}),
    ("POST", "/checkpoint", {}),
    ("POST", "/v1/fine_tuning/jobs", {
        "model": "fake", "training_file": "FILE", "seed": 1, "suffix": "a", "metadata": {"a": "b"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}},
    }),
    ("POST", "/train/jobs/JOB/cancel", {}),
    ("POST", "/v1/fine_tuning/jobs/JOB/pause", {}),
    ("GET", "/v1/fine_tuning/jobs?limit=3&after=JOB", None),
    ("GET", "/v1/files?limit=3&purpose=fine-tune", None),
    ("GET", "/train/jobs/JOB/events?after=1&limit=5", None),
    ("GET", "/train/status", None),
]  # fmt: skip
"""A valid request of each kind; FILE and JOB stand for ids that exist."""
Stack = tuple[Any, FakeRanks, CoordinatorProcess]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    # a busy machine is not the subject: a trainer that counts as gone is answered 503
    with chat_stack(tmp_path, max_queued_jobs=50, max_state_bytes=2**24, rank_timeout_seconds=30.0) as stack:
        yield stack


def _ids(client: Any) -> dict[str, str]:
    file = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
    return {"FILE": file, "JOB": client.post("/train", json=ONE | {"wait": True}).json()["id"]}


def _filled(ids: dict[str, str]) -> list[tuple[str, str, Any]]:
    text = json.dumps(BODIES)
    for name, value in ids.items():
        text = text.replace(name, value)
    return [tuple(entry) for entry in json.loads(text)]


def _check_well(stack: Stack, before: int) -> None:
    """The same process answers, trains, has logged no traceback and has not grown by more than 300 MB."""
    client, ranks, coordinator = stack
    assert coordinator.process is not None
    assert coordinator.process.poll() is None, coordinator.log_path.read_text()[-3000:]
    job = client.post("/train", json=ONE | {"epochs": 3}).json()
    assert ends(client, job["id"])["state"] == "succeeded"
    assert [step for name, step in ranks.applied() if name == job["id"]] == [1, 2, 3]
    known = {j["id"] for j in _all_jobs(client)}
    assert {name for name, _ in ranks.applied()} <= known, "a step of a job that was never accepted"
    assert '"exception"' not in coordinator.log_path.read_text()
    assert psutil.Process(coordinator.process.pid).memory_info().rss < before + 300 * 2**20


def _all_jobs(client: Any) -> Iterator[Any]:
    after = ""
    while True:
        page = client.get("/train/jobs", params={"limit": 100} | ({"after": after} if after else {})).json()
        yield from page["data"]
        if not page["has_more"]:
            return
        after = page["data"][-1]["id"]


def _rss(coordinator: CoordinatorProcess) -> int:
    assert coordinator.process is not None
    return psutil.Process(coordinator.process.pid).memory_info().rss


def _in_threads(work: Callable[[int], collections.Counter[str]]) -> collections.Counter[str]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)), collections.Counter())


def test_changed_values(stack: Stack, count: Any, report: Any) -> None:
    """Valid requests whose JSON or query was changed: each has an answer, and none is a 5xx."""
    client, _, coordinator = stack
    requests, before, total = _filled(_ids(client)), _rss(coordinator), count("requests")
    host = coordinator.url.removeprefix("http://")

    def send(thread: int) -> collections.Counter[str]:
        draw, answers = random.Random(thread), collections.Counter[str]()
        connection = http.client.HTTPConnection(host, timeout=30)
        for _ in range(total // THREADS):
            method, path, body = draw.choice(requests)
            if body is None:
                changed = damaged(path.encode(), 1, draw.random())[0].decode("latin-1")
                path, payload = "".join(c for c in changed if 32 < ord(c) < 127) or "/", None
                path = path.replace("/stream", "")
            else:
                value = damaged_value(body, draw)
                if isinstance(value, dict) and value.get("wait"):
                    value["wait"] = False  # how long an answer takes is not the subject
                payload = json.dumps(value).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status < 500, (method, path, payload, answer.status, text[:500])
            answers[f"{answer.status // 100}xx"] += 1
        connection.close()
        return answers

    answers = _in_threads(send)
    report(f"{answers.total():,} requests: {dict(sorted(answers.items()))}")
    assert min(answers["2xx"], answers["4xx"]) > answers.total() / 20, "hardly anything was accepted, or refused"
    _check_well(stack, before)


def test_damaged_bytes(stack: Stack, count: Any, report: Any) -> None:
    """Whole requests with bytes exchanged, cut out or put in: answered below 500, or the connection is closed."""
    client, _, coordinator = stack
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
        b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + CHAT + b"\r\n--b--\r\n"
    )
    requests = [raw_request(m, p, b"" if b is None else json.dumps(b).encode()) for m, p, b in _filled(_ids(client))]
    requests.append(raw_request("POST", "/v1/files", form, "multipart/form-data; boundary=b"))
    before, total = _rss(coordinator), count("damaged requests")
    host, port = coordinator.url.removeprefix("http://").split(":")

    def send(thread: int) -> collections.Counter[str]:
        draw, answers = random.Random(thread), collections.Counter[str]()
        for _ in range(total // THREADS):
            [request] = damaged(draw.choice(requests), 1, draw.getrandbits(32))
            with socket.create_connection((host, int(port)), timeout=0.2) as connection:
                try:
                    connection.sendall(request)
                    line = connection.recv(4096).partition(b"\r\n")[0]
                except (TimeoutError, ConnectionError):
                    line = b""
            status = line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else "none"
            assert not status.startswith("5"), (request, line)
            answers[f"{status[0]}xx" if status != "none" else "no answer in 0.2 s"] += 1
        return answers

    answers = _in_threads(send)
    report(f"{answers.total():,} requests: {dict(sorted(answers.items()))}")
    assert answers["4xx"] > 0
    _check_well(stack, before)
