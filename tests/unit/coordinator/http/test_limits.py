"""What one client may hold or fill: streams, open requests, slow and large bodies, the disk; and equal keys in JSON."""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.http import bodies, middleware
from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.middleware import ServiceMiddleware
from apollo_tp.coordinator.http.train import MAX_DRY_RUN_BYTES, STREAMS_PER_CLIENT
from apollo_tp.coordinator.samples.unique_keys import check_unique_keys
from apollo_tp.errors import RequestError
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.jobs import CHAT, ONE

READ, TRAIN = "r" * 20, "t" * 20


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("l")
    tokens = folder / "tokens"
    tokens.write_text(f"read:{READ}\ntrain:{TRAIN}\n")
    tokens.chmod(0o600)
    with (
        CoordinatorProcess(folder, token_file=str(tokens)) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.02),
        coordinator.client(headers={"Authorization": f"Bearer {TRAIN}"}) as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield client, coordinator


def test_streams_of_one_client_are_limited(stack):
    """Its further ones are refused with a reason; others still get theirs, and a closed one makes room."""
    client, coordinator = stack
    job = client.post("/train", json=ONE | {"epochs": 10_000}).json()["id"]
    path = f"/train/jobs/{job}/events?stream=true"
    reader = {"Authorization": f"Bearer {READ}"}
    with contextlib.ExitStack() as held:
        many = held.enter_context(httpx.Client(base_url=coordinator.url, limits=httpx.Limits(max_connections=None)))
        streams = [held.enter_context(many.stream("GET", path, headers=reader)) for _ in range(STREAMS_PER_CLIENT)]
        assert {stream.status_code for stream in streams} == {200}
        refused = client.get(path, headers=reader)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
        assert refused.headers["retry-after"]
        assert client.get(path.partition("?")[0], headers=reader).status_code == 200
        with client.stream("GET", path) as own:
            assert own.status_code == 200
        streams[0].close()

        def opened():
            with many.stream("GET", path, headers=reader) as again:
                return again.status_code == 200

        wait_for(opened)
    client.post(f"/train/jobs/{job}/cancel")


def served(app, requests, **limits):
    """The statuses of ``requests`` (receive functions with a path), which are all open at the same time."""
    access = Access([])
    service = ServiceMiddleware(app, access, ServiceConfig(**limits), lambda: None)

    async def one(path, receive, client, headers=()):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "client": (client, 1)}
        await service(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), sent

    async def main():
        return await asyncio.gather(*(one(*request) for request in requests))

    return asyncio.run(main())


def test_open_requests_of_one_client_are_limited():
    """Whatever they wait for; another client's are not."""
    done = asyncio.Event()

    async def app(scope, receive, send):
        count["open"] += 1
        if count["open"] == 300:
            done.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), 0.5)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    count = {"open": 0}
    answers = served(app, [("/train", None, "127.0.0.1")] * 300 + [("/train", None, "127.0.0.2")])
    statuses = [status for status, *_ in answers]
    assert statuses.count(200) == middleware.REQUESTS_PER_CLIENT + 1
    assert statuses[-1] == 200
    assert statuses.count(429) == 300 - middleware.REQUESTS_PER_CLIENT


@pytest.mark.parametrize("interval", [None, 0.02])
def test_a_body_has_a_deadline(monkeypatch, interval):
    """A silent client, and one that sends a byte now and then, is answered 408, and the connection is closed; one that sends
    at the demanded rate is not, nor is one whose body waits for its turn."""
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)

    async def app(scope, receive, send):
        while (await receive())["more_body"]:  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.1 if scope["path"] == "/train/score" else 0)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def slow():
        await asyncio.sleep(60 if interval is None else interval)
        return {"type": "http.request", "body": b"x", "more_body": True}

    def quick(parts):
        async def receive():
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"x" * 16_000, "more_body": next(left) > 0}

        left = iter(range(parts - 1, -1, -1))
        return receive

    start = time.monotonic()
    requests = [("/train", slow), ("/train", quick(20)), ("/train/score", quick(8))]
    (late, headers, _), (whole, *_), (waits, *_) = served(app, [(*each, "127.0.0.1") for each in requests])
    assert time.monotonic() - start < 10
    assert (late, headers[b"connection"]) == (408, b"close")
    assert whole == waits == 200


def test_bodies_without_samples_are_small(stack):
    """Only routes that take samples or files read more than a megabyte."""
    client, _ = stack
    large = b'{"metadata": {"a": "' + b"x" * 2**20 + b'"}}'
    for path in (
        "/v1/fine_tuning/jobs",
        "/checkpoint",
        "/v1/uploads",
        "/v1/uploads/x/complete",
        "/train/jobs/x/cancel",
    ):
        answer = client.post(path, content=large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large"), path
    assert client.post("/train?dry_run=1", content=b" " * (MAX_DRY_RUN_BYTES + 1)).status_code == 413
    assert client.post("/train", content=b" " * (2 * 2**20) + json.dumps(ONE).encode()).status_code == 202


def test_large_bodies_have_turns(tmp_path):
    """One at a time, while small ones pass; more than MAX_WAITING are refused, and no file is left."""
    gate = asyncio.Event()
    inside = []

    async def request(size, pieces=1):
        async def stream():
            for _ in range(pieces):
                yield b"x" * (size // pieces)

        async with large.received(SimpleNamespace(stream=stream)) as data:
            inside.append(len(data))
            if len(data) > bodies.MEMORY_BYTES:
                most.append(sum(size > bodies.MEMORY_BYTES for size in inside))
                await gate.wait()
                assert data[:] == b"x" * size
            inside.remove(len(data))

    async def main():
        sizes = [3_000_000 + i for i in range(bodies.MAX_WAITING)]
        tasks = [asyncio.create_task(request(size)) for size in sizes]
        while not inside:  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.01)
        await request(1000)
        while large._waiting < bodies.MAX_WAITING:  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.01)
        with pytest.raises(RequestError) as error:
            await request(2_000_000)
        assert error.value.status == 429
        gate.set()
        await asyncio.gather(*tasks)
        await request(5_000_000, pieces=50)

    large, most = bodies.LargeBodies(tmp_path), []
    asyncio.run(main())
    assert set(most) == {1}
    assert list(tmp_path.iterdir()) == []


def rss(process):
    with open(f"/proc/{process.pid}/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@pytest.mark.slow
def test_many_large_bodies_fill_no_memory(stack):
    """Of clients that send at the same time and of which each is refused in the end: they are on disk meanwhile."""
    client, coordinator = stack
    before, peak, stop = rss(coordinator.process), [0], threading.Event()

    def watch():
        while not stop.wait(0.005):
            peak[0] = max(peak[0], rss(coordinator.process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    size = 40 * 2**20
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda _: client.post("/train", content=b" " * size, timeout=120).status_code, range(6))
        )
    stop.set()
    watcher.join()
    assert set(answers) == {413}
    assert peak[0] - before < size


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of a few megabytes")
def test_a_full_disk_is_told_with_bytes(tmp_path):
    """Before anything is read if the size is known, and when the disk becomes full: 507 with what is needed and free, and
    nothing is left of the upload or the job."""
    disk = tmp_path / "state"
    disk.mkdir(mode=0o700)
    if os.system(f"mount -t tmpfs -o size=6m,mode=700 tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("this container may not mount")
    try:
        with CoordinatorProcess(tmp_path) as coordinator, coordinator.client() as client:
            content = CHAT * (8 * 2**20 // len(CHAT))
            files, form = {"file": ("a.jsonl", content)}, {"purpose": "fine-tune"}
            answer = client.post("/v1/files", files=files, data=form)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
            free, _, needed = [int(word) for word in re.findall(r"\b[0-9]+\b", answer.json()["error"]["message"])][-3:]
            assert needed > len(content) > free > 0
            (disk / "other").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 2**20 // 2))

            def chunks():
                boundary = b"--b\r\nContent-Disposition: form-data; name="
                yield boundary + b'"purpose"\r\n\r\nfine-tune\r\n'
                yield boundary + b'"file"; filename="a"\r\n\r\n' + content + b"\r\n--b--\r\n"

            kind = {"Content-Type": "multipart/form-data; boundary=b"}
            for request in (
                lambda: client.post("/v1/files", content=chunks(), headers=kind),
                lambda: client.post("/train", json={"samples": [ONE] * 20_000}),
                lambda: client.post("/v1/uploads", json={
                    "bytes": 10**6, "filename": "a", "mime_type": "", "purpose": "fine-tune"}),
            ):  # fmt: skip
                answer = request()
                assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full"), answer.text
                assert "bytes free" in answer.json()["error"]["message"]
            assert list((disk / "files").iterdir()) == list((disk / "samples").iterdir()) == []
            (disk / "other").unlink()
            assert client.post("/train", json=ONE).status_code == 202
            assert '"exception"' not in coordinator.log_path.read_text()
    finally:
        os.system(f"umount {disk}")


def test_an_upload_whose_client_leaves_leaves_nothing(stack):
    """Neither while it is read nor while it is written."""
    client, coordinator = stack
    host, port = coordinator.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TRAIN}\r\nContent-Length: 5000000\r\n"
        'Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; name="file"; '
        'filename="a"\r\n\r\n'
    ).encode()
    for sent in (0, 100_000, 3_000_000):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + b"x" * sent)
            time.sleep(0.2)
    wait_for(lambda: client.get("/health").status_code == 200)
    assert client.get("/v1/files").json()["data"] == []
    assert list((coordinator.folder / "state" / "files").iterdir()) == []


def test_a_file_whose_writing_is_cancelled_is_removed(tmp_path):
    """The thread that writes cannot be stopped, so its file goes when it is complete."""
    path = tmp_path / "a"
    release = threading.Event()

    def write(target):
        target.write(b"x")
        release.wait(5)

    async def main():
        task = asyncio.create_task(bodies.write_file(path, write))
        while not path.exists():  # noqa: ASYNC110 - no event reports it
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        async with asyncio.timeout(5):
            while path.exists():  # noqa: ASYNC110 - no event reports it
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_uploads_at_once_keep_the_quota(tmp_path):
    """Together, and not each for itself."""
    with CoordinatorProcess(tmp_path, max_state_bytes=3_000_000) as coordinator, coordinator.client() as client:
        content = CHAT * (1_000_000 // len(CHAT))
        with ThreadPoolExecutor(8) as pool:
            form = {"purpose": "fine-tune"}
            answers = list(pool.map(
                lambda _: client.post("/v1/files", files={"file": ("a", content)}, data=form).status_code, range(8)
            ))  # fmt: skip
        used = sum(path.stat().st_size for path in (tmp_path / "state" / "files").iterdir())
    assert used <= 3_000_000
    assert set(answers) == {200, 413}


def test_the_layout_is_sent_once(stack):
    """A page that has it gets 304 without a body."""
    client, _ = stack
    first = client.get("/train/layout")
    assert len(first.json()["data"]) == 2
    tag = first.headers["etag"]
    for known, status in ((tag, 304), (f'"x", W/{tag}', 304), ("*", 304), ('"x"', 200)):
        answer = client.get("/train/layout", headers={"If-None-Match": known})
        assert (answer.status_code, answer.headers["etag"]) == (status, tag), known
        assert bool(answer.content) == (status == 200)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"epochs": 1, "epochs": 100}', "epochs"),
        ('{"samples": [{"text": "b", "text": "c"}]}', "text"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "role"),
        ('{"a": {"b": [{"c": 1, "c": 2}]}}', "c"),
        ('{"te\\u0078t": 1, "text": 2}', "text"),
        ('{"a\\"b": 1, "a\\"b": 2}', 'a\\"b'),
        ('{"a" : 1,\n "a"\t: 2}', "a"),
    ],
)
def test_equal_keys_are_refused(stack, text, key):
    """On any level and in any spelling: of two epochs or roles, which one was meant?"""
    with pytest.raises(RequestError, match="twice") as error:
        check_unique_keys(text.encode())
    assert error.value.field == key
    client, _ = stack
    answer = client.post("/train", content=text.encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "duplicate_key")


def test_other_texts_have_no_equal_keys():
    """Neither keys of different objects, nor strings that look like keys, nor anything that json.dumps writes."""
    texts = ['{"a": {"a": [{"a": "a"}, {"a": 1}]}, "b": "a\\": {\\"a"}',
             '["a", "a", {"b": "b"}, "b"]', '{"a": "}", "b": "{"}',
             "", "{", "}", '"', '"a', "]]", "nul", '{"a"', '{"\\\\": 1, "\\"": 2}']  # fmt: skip
    pick = random.Random(0)

    def value(depth):
        kind = pick.randrange(6 if depth else 3)
        if kind < 3:
            return ["".join(pick.choice('"\\{}[]:, aü\n') for _ in range(pick.randrange(8))), 1.5, None][kind]
        if kind < 5:
            return {str(value(0)): value(depth - 1) for _ in range(4)}
        return [value(depth - 1) for _ in range(4)]

    for text in [*texts, *(json.dumps(value(4), ensure_ascii=pick.random() < 0.5) for _ in range(300))]:
        check_unique_keys(text.encode())
