"""The same routes on the server's port: the endpoint plugin in a real FastAPI app under uvicorn, over the ZMQ tunnel."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
import zmq
import zmq.asyncio
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response, StreamingResponse

from apollo_tp import protocol, runtime
from apollo_tp.coordinator.__main__ import bind_http
from apollo_tp.coordinator.tunnel import Tunnel
from apollo_tp.manifest import CLAIMED_VARIABLE, REFUSED_VARIABLE
from apollo_tp.vllm_plugin.endpoints import ApolloEndpoints
from tests.unit.fakes import CoordinatorProcess, FakeRanks, wait_for

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


class Server:
    """What vLLM does with the plugin: build an app, attach, serve."""

    def __init__(self, root_path="", uds=None):
        app = FastAPI()
        app.root_path = root_path
        app.get("/ping")(lambda: {"ok": True})
        self.plugin = ApolloEndpoints()
        self.plugin.attach_router(app)
        if uds is None:
            self.socket = bind_http("127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(str(uds))
            self.socket.listen()
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    os.environ |= {"APOLLO_TP_INSTANCE": "i", "APOLLO_TP_CLAIMED": "1", "APOLLO_TP_RUNTIME_DIR": str(folder)}
    folder.chmod(0o700)
    coordinator = CoordinatorProcess(folder, max_body_bytes=3_000_000)
    server = Server()
    try:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            answer = client.get("/train/status")
            assert answer.status_code == 503  # before any trainer ever ran
            with (
                coordinator,
                FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.02) as ranks,
                coordinator.client() as direct,
            ):
                wait_for(lambda: direct.get("/health").json()["trainer"])
                yield client, direct, ranks, coordinator
    finally:
        coordinator.stop()
        server.close()
        for name in ("APOLLO_TP_INSTANCE", "APOLLO_TP_CLAIMED", "APOLLO_TP_RUNTIME_DIR"):
            del os.environ[name]


def test_the_routes_answer_alike_on_both_ports(stack):
    """A job posted on the server's port is the coordinator's, with the same body and status."""
    client, direct, *_ = stack
    answer = client.post("/train", json=ONE | {"epochs": 3})
    assert answer.status_code == 202
    job = answer.json()["id"]
    assert answer.headers["location"] == f"/train/jobs/{job}"
    wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "succeeded")
    ours, theirs = client.get(f"/train/jobs/{job}"), direct.get(f"/train/jobs/{job}")
    assert (ours.json(), ours.headers["content-type"]) == (theirs.json(), theirs.headers["content-type"])
    header = "x-apollo-weight-version"
    assert ours.headers[header] == theirs.headers[header] == str(ours.json()["weight_version"])
    assert client.get("/train/jobs?limit=1").json() == direct.get("/train/jobs?limit=1").json()
    assert client.post("/train", content=b"{").json() == direct.post("/train", content=b"{").json()
    assert client.post("/checkpoint", json={"wait": True}).json()["state"] == "succeeded"
    assert client.get("/train/nope").status_code == 404


def test_a_root_path_is_no_part_of_the_route(stack):
    """Under --root-path a request is the same, whether a proxy has taken the prefix off or not; odd names stay whole."""
    client, direct, *_ = stack
    server = Server("/api")
    try:
        for url in (f"{server.url}/api", server.url, client.base_url):
            assert httpx.get(f"{url}/train/status").status_code == 200, url
            answer = httpx.get(f"{url}/train/jobs/a%3Fb")
            assert answer.json() == direct.get("/train/jobs/a%3Fb").json(), url
            assert "a?b" in answer.text
    finally:
        server.close()


def test_events_arrive_live_through_the_tunnel(stack):
    """SSE is streamed: the first event comes long before the job's end, and the stream ends with the job."""
    client, *_ = stack
    job = client.post("/train", json=ONE | {"epochs": 30}).json()["id"]
    with client.stream("GET", f"/train/jobs/{job}/events?stream=true") as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("id: "))
        assert client.get(f"/train/jobs/{job}").json()["state"] in ("queued", "running")
        assert sum(line.startswith("event: metrics") for line in lines) == 30


def test_large_bodies_both_ways(stack):
    """Bodies of many frames arrive whole; over the limit they are refused with 413."""
    client, *_ = stack
    samples = [{"context_ids": [1] * 100, "continuation_ids": [2]}] * 5000
    answer = client.post("/train?dry_run=true", json={"samples": samples})
    assert answer.status_code == 200
    assert len(answer.json()["samples"]) == 5000
    assert client.post("/train", content=b" " * 4_000_000).status_code == 413


def test_a_client_that_leaves_ends_its_request(stack):
    """When a client drops an event stream, the coordinator's task for it ends."""
    client, direct, *_ = stack
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()["id"]
    with client.stream("GET", f"/train/jobs/{job}/events?stream=true") as stream:
        next(stream.iter_lines())
    client.post(f"/train/jobs/{job}/cancel")
    wait_for(lambda: direct.get("/train/status").json()["running"] is None)


def test_the_servers_other_routes_do_not_wait_for_us(stack):
    """While a tunnelled request waits, the server's own routes answer: its event loop is never blocked."""
    client, *_ = stack
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()["id"]
    waiting = threading.Thread(
        target=client.post, args=("/train",), kwargs={"json": ONE | {"wait": True, "wait_seconds": 3}}
    )
    waiting.start()
    time.sleep(0.2)
    start = time.monotonic()
    assert httpx.get(f"{client.base_url}/ping").status_code == 200
    assert time.monotonic() - start < 1.0
    client.post(f"/train/jobs/{job}/cancel")
    waiting.join(20)
    assert not waiting.is_alive()


def test_without_a_coordinator_the_answer_is_503_and_comes_back(stack):
    """A dead coordinator gives 503 with a clear body, in bounded time; a request answered 503 is never run later."""
    client, _direct, _ranks, coordinator = stack
    coordinator.kill()
    start = time.monotonic()
    answer = client.post("/train", json=ONE)
    assert answer.status_code == 503
    assert time.monotonic() - start < 8
    assert "coordinator" in answer.json()["error"]["message"]
    coordinator.start()
    wait_for(lambda: client.get("/train/status").status_code == 200)
    with coordinator.client() as again:
        wait_for(lambda: again.get("/health").json()["trainer"])
        jobs = again.get("/train/status").json()
        assert jobs["queue"] == []
        assert jobs["running"] is None
        assert client.post("/train", json=ONE | {"wait": True}).json()["state"] == "succeeded"


def test_without_tokens_other_machines_are_refused(stack):
    """vLLM listens on all addresses by default: whoever reaches its port must not be able to train, nor a page whose name
    resolves to this machine."""
    app = FastAPI()
    ApolloEndpoints().attach_router(app)

    async def ask(address, host):
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.post("/train?dry_run=true", json=ONE)

    for address, host, status, words in [
        ("127.0.0.1", "localhost:8000", 200, ""),
        ("::ffff:127.0.0.1", "10.0.0.5:8000", 200, ""),
        ("10.0.0.7", "10.0.0.5:8000", 403, "got a request from 10.0.0.7 while the trainer has no tokens"),
        ("127.0.0.1", "evil.example:8000", 403, "got Host 'evil.example'"),
    ]:
        answer = asyncio.run(ask(address, host))
        assert answer.status_code == status, answer.text
        assert words in answer.text


def test_without_tokens_the_servers_unix_socket_is_refused(stack, tmp_path):
    """vLLM's --uds is there for a proxy, which may pass on requests from anywhere without a word."""
    server = Server(uds=tmp_path / "uds")
    try:
        transport = httpx.HTTPTransport(uds=str(tmp_path / "uds"))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=10) as client:
            answer = client.post("/train?dry_run=true", json=ONE)
    finally:
        server.close()
    assert answer.status_code == 403, answer.text
    assert "got a request from a unix socket while the trainer has no tokens" in answer.text


def test_a_server_whose_name_is_taken_keeps_off_the_other_one(tmp_path, monkeypatch):
    """It neither listens for the other's trainer nor forwards to it; the 503 says why."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv(runtime.RUNTIME_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv(runtime.INSTANCE_VARIABLE, "prod")
    monkeypatch.setenv(CLAIMED_VARIABLE, "")
    monkeypatch.setenv(REFUSED_VARIABLE, "instance prod: got a name that a live server has")
    folder = runtime.instance_dir("prod")
    for name in ("coordinator.sock", protocol.SYNC_SOCKET):
        (folder / name).touch()
    plugin = ApolloEndpoints()
    asyncio.run(plugin.init_state(SimpleNamespace(), None, SimpleNamespace()))
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["coordinator.sock", "sync.sock"]
    server = Server()
    try:
        answer = httpx.post(f"{server.url}/train", json=ONE)
    finally:
        server.close()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_trainer"
    assert "a name that a live server has" in answer.json()["error"]["message"]


@contextlib.asynccontextmanager
async def tunnel_to(app, path):
    """The coordinator's end of a tunnel in this process, and what makes peers of it."""
    context = zmq.asyncio.Context()
    tunnel = Tunnel(context, lambda socket: socket.bind(f"ipc://{path}"), app)
    running = asyncio.create_task(tunnel.run())

    def peer():
        socket = context.socket(zmq.DEALER)
        socket.connect(f"ipc://{path}")
        return socket

    try:
        yield tunnel, peer
    finally:
        running.cancel()
        await asyncio.wait({running})
        context.destroy(linger=0)


async def ask(peer):
    await peer.send(protocol.encode_tunnel(protocol.TunnelRequest(1, "GET", "/", b"", [])))


async def answer_of(peer):
    parts = []
    while not parts or parts[-1].more:
        message = protocol.decode_tunnel_down(await peer.recv())
        if isinstance(message, protocol.TunnelBody):
            parts.append(message)
            await peer.send(protocol.encode_tunnel(protocol.TunnelTaken(1, len(message.data))))
    return [part.data for part in parts]


def test_a_peer_that_stalls_loses_nothing(tmp_path):
    """An answer longer than the queues arrives whole when its peer reads again, and meanwhile others are served."""
    numbers = [b"%04d" % number + bytes(1000) for number in range(6000)]

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        for number in numbers:
            await send({"type": "http.response.body", "body": number, "more_body": True})
        sent.append(await send({"type": "http.response.body"}))

    async def main():
        async with tunnel_to(app, tmp_path / "t") as (_, peer), asyncio.timeout(20):
            slow, other = peer(), peer()
            await ask(slow)
            await slow.poll()
            await ask(other)
            assert await answer_of(other) == [*numbers, b""]
            assert len(sent) == 1
            assert await answer_of(slow) == [*numbers, b""]

    sent = []
    asyncio.run(main())


def test_a_slow_client_fills_no_memory(tmp_path, monkeypatch):
    """Of a large answer that its client does not read, little is sent to the server; read at last, it arrives whole."""
    tmp_path.chmod(0o700)
    (tmp_path / "i").mkdir(mode=0o700)
    monkeypatch.setenv("APOLLO_TP_INSTANCE", "i")
    monkeypatch.setenv("APOLLO_TP_RUNTIME_DIR", str(tmp_path))
    part, count, sent = bytes(2**20), 100, []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        for number in range(count):
            await send({"type": "http.response.body", "body": part, "more_body": number + 1 < count})
            sent.append(number)

    async def main():
        path = tmp_path / "i" / "coordinator.sock"
        client = httpx.AsyncClient(base_url=server.url, timeout=20)
        async with tunnel_to(app, path) as (tunnel, _), client, client.stream("GET", "/train/large") as answer:
            before = -1
            while before < len(sent):  # until nothing more is sent
                before = len(sent)
                await asyncio.sleep(0.5)
            # the window, and what sockets on the way hold
            assert before <= 2 * protocol.TUNNEL_WINDOW_BYTES // len(part) + 8
            assert sum([len(piece) async for piece in answer.aiter_raw()]) == count * len(part)
        assert tunnel._windows == {}

    server = Server()
    try:
        asyncio.run(main())
    finally:
        server.close()


def test_a_client_that_takes_nothing_is_given_up(tmp_path, monkeypatch, caplog):
    """Its request ends, on both sides."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        while True:
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})

    async def main():
        async with tunnel_to(app, tmp_path / "t") as (tunnel, peer), asyncio.timeout(10):
            stalled = peer()
            await ask(stalled)
            await stalled.poll()
            (task,) = tunnel._tasks.values()
            await asyncio.wait({task})
            assert tunnel._windows == {}

    monkeypatch.setattr("apollo_tp.coordinator.tunnel.UNTAKEN_SECONDS", 0.2)
    asyncio.run(main())
    assert "its client took nothing for 0.2 s" in caplog.text


def test_a_peer_that_is_gone_ends_its_request(tmp_path, monkeypatch, caplog):
    """Its task is cancelled, with one line in the log and no exception that nobody retrieves."""

    async def app(scope, receive, send):
        await asyncio.Event().wait()

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        async with tunnel_to(app, tmp_path / "t") as (tunnel, peer), asyncio.timeout(10):
            leaving = peer()
            await ask(leaving)
            await leaving.poll()
            (task,) = tunnel._tasks.values()
            leaving.close(0)
            await asyncio.wait({task})
            assert tunnel._tasks == tunnel._bodies == {}
        gc.collect()

    unhandled = []
    monkeypatch.setattr(protocol, "TUNNEL_ALIVE_SECONDS", 0.01)
    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no answer of GET /: " in caplog.text
    assert not unhandled


def test_a_request_that_is_cancelled_before_it_begins_is_forgotten(tmp_path):
    """As many of them as may be open at once would be the end of the tunnel."""

    async def main():
        async with tunnel_to(answers_of_all_kinds, tmp_path / "t") as (tunnel, _):
            tunnel._received(b"peer", protocol.TunnelRequest(1, "GET", "/", b"", []))
            (task,) = tunnel._tasks.values()
            tunnel._received(b"peer", protocol.TunnelCancel(1))
            await asyncio.wait({task})
            assert tunnel._tasks == tunnel._bodies == {}

    asyncio.run(main())


async def answers_of_all_kinds(scope, receive, send):
    async def parts():
        yield b"12"
        yield b"345"

    await {
        "/train/plain": JSONResponse([12345]),
        "/train/stream": StreamingResponse(parts()),
        "/train/204": Response(status_code=204),
        "/train/304": Response(status_code=304, headers={"Etag": "x"}),
        "/train/short": StreamingResponse(parts(), headers={"Content-Length": "6"}),
    }[scope["path"]](scope, receive, send)


def test_an_answer_keeps_its_length(tmp_path, monkeypatch):
    """A body shorter than the coordinator said is an error at the client; answers without a length or body still work."""
    tmp_path.chmod(0o700)
    (tmp_path / "i").mkdir(mode=0o700)
    monkeypatch.setenv("APOLLO_TP_INSTANCE", "i")
    monkeypatch.setenv("APOLLO_TP_RUNTIME_DIR", str(tmp_path))

    async def main():
        async with (
            tunnel_to(answers_of_all_kinds, tmp_path / "i" / "coordinator.sock"),
            httpx.AsyncClient(base_url=server.url, timeout=10) as client,
        ):
            for method, name, status, length, body in (
                ("GET", "plain", 200, "7", b"[12345]"),
                ("HEAD", "plain", 200, "7", b""),
                ("GET", "stream", 200, None, b"12345"),
                ("HEAD", "stream", 200, None, b""),
                ("GET", "204", 204, None, b""),
                ("GET", "304", 304, None, b""),
            ):
                answer = await client.request(method, f"/train/{name}")
                got = (answer.status_code, answer.headers.get("content-length"), answer.content)
                assert got == (status, length, body), (method, name)
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/train/short")

    server = Server()
    try:
        asyncio.run(main())
    finally:
        server.close()
