"""The same routes on the server's port: the endpoint plugin in a real FastAPI app under uvicorn, over the ZMQ tunnel."""

import asyncio
import os
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from apollo_tp.coordinator.__main__ import bind_http
from apollo_tp.runtime import instance_folder, private_files
from apollo_tp.shards.instance import CLAIMED_VARIABLE, REFUSED_VARIABLE
from apollo_tp.vllm_plugin.endpoints import ApolloEndpoints
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for

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


def test_the_routes_give_identical_answers_on_both_ports(stack):
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
    client, direct, *_ = stack
    job = client.post("/train", json=ONE | {"epochs": 1000}).json()["id"]
    waiting = threading.Thread(
        target=client.post, args=("/train",), kwargs={"json": ONE | {"wait": True, "wait_seconds": 3}}
    )
    waiting.start()
    wait_for(lambda: direct.get("/train/status").json()["queue"], what="the request that waits")
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
    monkeypatch.setenv(private_files.RUNTIME_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "prod")
    monkeypatch.setenv(CLAIMED_VARIABLE, "")
    monkeypatch.setenv(REFUSED_VARIABLE, "instance prod: got a name that a live server has")
    folder = instance_folder.instance_dir("prod")
    for name in ("coordinator.sock", instance_folder.SYNC_SOCKET):
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
