"""The tunnel under load: slow, stalled and vanished clients, and answers of all kinds."""

import asyncio
import contextlib
import gc
import json
import os

import httpx
import pytest
import zmq
import zmq.asyncio
from starlette.responses import JSONResponse, Response, StreamingResponse

from apollo_tp.coordinator.http.tunnel import Tunnel
from apollo_tp.runtime import instance_folder
from apollo_tp.wire import codec
from apollo_tp.wire import tunnel as tunnel_messages
from tests.support.plugin_server import PluginServer


def _serve_from(folder, monkeypatch):
    """As a server's process that has claimed the name "i" in this runtime folder."""
    folder.chmod(0o700)
    (folder / "i").mkdir(mode=0o700)
    address = {"url": "http://127.0.0.1:1", "pid": os.getpid()}  # the coordinator is this process
    (folder / "i" / instance_folder.ADDRESS_FILE).write_text(json.dumps(address))
    for name, value in {"INSTANCE": "i", "CLAIMED": "1", "RUNTIME_DIR": str(folder)}.items():
        monkeypatch.setenv(f"APOLLO_TP_{name}", value)


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
    await peer.send(codec.encode(tunnel_messages.TunnelRequest(1, "GET", "/", b"", [])))


async def answer_of(peer):
    parts = []
    while not parts or parts[-1].more:
        message = codec.decode(await peer.recv(), tunnel_messages.TunnelDown)
        if isinstance(message, tunnel_messages.TunnelBody):
            parts.append(message)
            await peer.send(codec.encode(tunnel_messages.TunnelTaken(1, len(message.data))))
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
    _serve_from(tmp_path, monkeypatch)
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
            assert before <= 2 * tunnel_messages.TUNNEL_WINDOW_BYTES // len(part) + 8
            assert sum([len(piece) async for piece in answer.aiter_raw()]) == count * len(part)
        assert tunnel._windows == {}

    server = PluginServer()
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

    monkeypatch.setattr("apollo_tp.coordinator.http.tunnel.UNTAKEN_SECONDS", 0.2)
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
    monkeypatch.setattr(tunnel_messages, "TUNNEL_ALIVE_SECONDS", 0.01)
    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no answer of GET /: " in caplog.text
    assert not unhandled


def test_a_request_that_is_cancelled_before_it_begins_is_forgotten(tmp_path):
    """As many of them as may be open at once would be the end of the tunnel."""

    async def main():
        async with tunnel_to(answers_of_all_kinds, tmp_path / "t") as (tunnel, _):
            tunnel._received(b"peer", tunnel_messages.TunnelRequest(1, "GET", "/", b"", []))
            (task,) = tunnel._tasks.values()
            tunnel._received(b"peer", tunnel_messages.TunnelCancel(1))
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
    _serve_from(tmp_path, monkeypatch)

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

    server = PluginServer()
    try:
        asyncio.run(main())
    finally:
        server.close()
