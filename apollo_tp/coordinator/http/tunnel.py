"""Requests that arrive on vLLM's own port: the plugin there forwards them over ZMQ, and the same routes answer them.

A ROUTER on a 0600 unix socket, and on request one over TCP with CURVE keys. A request is one asyncio task; frames that
cannot be decoded, or belong to no request, are dropped. The body of a request is bounded: the middleware refuses it as soon
as it exceeds the limit. The body of a response is sent as fast as the client reads it, so that a slow client fills no memory
of vLLM's process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apollo_tp.coordinator.http.errors import error_response
from apollo_tp.errors import FrameError, refuse
from apollo_tp.wire import codec
from apollo_tp.wire import tunnel as tunnel_messages

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 4 * 2**20
MAX_REQUESTS = 512
SEND_SECONDS = 10.0
FULL_SECONDS = 0.01
UNTAKEN_SECONDS = 300.0
"""A client that reads nothing of its answer for so long counts as gone."""
Key = tuple[bytes, int]


class Window:
    """How much more of a response's body may be sent, in bytes."""

    def __init__(self) -> None:
        self._left = tunnel_messages.TUNNEL_WINDOW_BYTES
        self._room = asyncio.Event()

    def give(self, num_bytes: int) -> None:
        self._left += num_bytes
        self._room.set()

    async def take(self, num_bytes: int) -> None:
        """Wait until some of the window is open, then use it: a part may be larger than what is left."""
        while self._left <= 0:
            self._room.clear()
            await self._room.wait()
        self._left -= num_bytes


class Tunnel:
    """Serves ``app`` on a ROUTER socket."""

    def __init__(self, context: zmq.asyncio.Context, bind: Callable[[zmq.Socket[Any]], None], app: ASGIApp) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # otherwise ZMQ silently drops what a full queue cannot take
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        bind(self._socket)
        self._app = app
        self._bodies: dict[Key, asyncio.Queue[tunnel_messages.TunnelBody | None]] = {}
        self._windows: dict[Key, Window] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                frames = await self._socket.recv_multipart()
                if len(frames) != 2:
                    log.warning("dropped a message of %d frames on the tunnel, expected 2", len(frames))
                    continue
                try:
                    self._received(frames[0], codec.decode(frames[1], tunnel_messages.TunnelUp))
                except FrameError as error:
                    log.warning("dropped %d bytes on the tunnel: %s", len(frames[1]), error)
        finally:
            for task in self._tasks.values():
                task.cancel()
            self._socket.close(0)

    def _received(self, peer: bytes, message: tunnel_messages.TunnelUp) -> None:
        key = (peer, message.id)
        if isinstance(message, tunnel_messages.TunnelRequest):
            if key in self._tasks:
                log.warning("dropped a tunnelled request whose number another open one has")
                return
            app = self._app if len(self._tasks) < MAX_REQUESTS else _busy
            if len(self._tasks) >= 2 * MAX_REQUESTS:
                log.warning("dropped a tunnelled request: %d wait for an answer already", len(self._tasks))
                return
            self._bodies[key], self._windows[key] = asyncio.Queue(), Window()
            name = f"{message.method} {message.path}"
            task = self._tasks[key] = asyncio.create_task(self._serve(app, key, message), name=name)
            task.add_done_callback(lambda _: self._forget(key))  # also if it was cancelled before it ran
        elif isinstance(message, tunnel_messages.TunnelBody):
            if key in self._bodies:
                self._bodies[key].put_nowait(message)
        elif isinstance(message, tunnel_messages.TunnelTaken):
            if key in self._windows:
                self._windows[key].give(message.num_bytes)
        elif key in self._tasks:
            self._cancel(key)

    def _cancel(self, key: Key) -> None:
        self._bodies[key].put_nowait(None)
        self._tasks[key].cancel()

    def _forget(self, key: Key) -> None:
        del self._tasks[key], self._bodies[key], self._windows[key]

    async def _serve(self, app: ASGIApp, key: Key, request: tunnel_messages.TunnelRequest) -> None:
        beat = asyncio.create_task(self._beat(key))
        try:
            await app(_scope(request), self._receiver(key), self._sender(key))
        finally:
            beat.cancel()

    async def _beat(self, key: Key) -> None:
        while True:
            await self._send(key, tunnel_messages.TunnelAlive(key[1]))
            await asyncio.sleep(tunnel_messages.TUNNEL_ALIVE_SECONDS)

    async def _send(self, key: Key, message: tunnel_messages.TunnelDown) -> None:
        """Send once the peer's queue has room. If it has none in time, or is gone, its request is cancelled."""
        frames = [key[0], codec.encode(message)]
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._put(frames)
        except (TimeoutError, zmq.ZMQError) as error:
            await self._give_up(key, str(error) or f"its queue was full for {SEND_SECONDS:g} s")

    async def _give_up(self, key: Key, reason: str) -> None:
        log.warning("the server's plugin takes no answer of %s: %s", self._tasks[key].get_name(), reason)
        self._cancel(key)
        await asyncio.Event().wait()  # until the cancellation arrives

    async def _put(self, frames: list[bytes]) -> None:
        while True:
            try:
                await self._socket.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:  # a blocking send would wake for any peer's queue, and delay the others
                await asyncio.sleep(FULL_SECONDS)

    def _receiver(self, key: Key) -> Any:
        ended = False

        async def receive() -> Message:
            nonlocal ended
            part = None if ended else await self._bodies[key].get()
            if ended:
                await asyncio.Event().wait()  # until the client goes, which cancels this task
            if part is None:
                return {"type": "http.disconnect"}
            ended = not part.more
            return {"type": "http.request", "body": part.data, "more_body": part.more}

        return receive

    def _sender(self, key: Key) -> Any:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", [])]
                await self._send(key, tunnel_messages.TunnelHead(key[1], message["status"], headers))
            elif message["type"] == "http.response.body":
                body, more = message.get("body", b""), message.get("more_body", False)
                step = MAX_FRAME_BYTES // 4
                for start in range(0, max(len(body), 1), step):
                    last = start + step >= len(body)
                    part = tunnel_messages.TunnelBody(key[1], body[start : start + step], more or not last)
                    await self._window(key, len(part.data))
                    await self._send(key, part)

        return send

    async def _window(self, key: Key, num_bytes: int) -> None:
        try:
            async with asyncio.timeout(UNTAKEN_SECONDS):
                await self._windows[key].take(num_bytes)
        except TimeoutError:
            await self._give_up(key, f"its client took nothing for {UNTAKEN_SECONDS:g} s")


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The application for requests beyond MAX_REQUESTS."""
    error = refuse("requests", f"{MAX_REQUESTS} through the server's port at the same time", "fewer; try again later",
                   status=503, code="too_many_requests")  # fmt: skip
    await error_response(error)(scope, receive, send)


def _scope(request: tunnel_messages.TunnelRequest) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers],
        "client": None if request.client is None else (request.client, 0),
        "server": None,
        "state": {},
    }
