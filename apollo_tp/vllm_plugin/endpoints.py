"""The trainer's HTTP routes on vLLM's own port (``vllm.endpoint_plugins``), forwarded to the coordinator over ZMQ.

vLLM's event loop is never blocked: everything is async, and every wait has a deadline. When no trainer runs, the answer
is 503. Imports neither torch nor vLLM until the server starts up. The plugin interface is the same in vLLM 0.26 to 0.32.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from apollo_tp.errors import ConfigError, FrameError
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.shards.instance import engine_folders, num_engines, unclaimed
from apollo_tp.vllm_plugin.capture import CaptureMiddleware, Recorder
from apollo_tp.vllm_plugin.update_lock import UpdateLock
from apollo_tp.wire import codec
from apollo_tp.wire import tunnel as tunnel_messages
from apollo_tp.wire.capture import CAPTURES_PATH

logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only

CONNECT_SECONDS = 3.0
"""A live coordinator is connected, or will be within the second that ZMQ takes to reconnect."""
ACCEPT_SECONDS = 10.0
"""The coordinator acknowledges a request at once; on a busy machine it may take this long."""
ALIVE_SECONDS = 15.0
"""The longest silence during an answer."""
CHUNK_BYTES = 256 * 1024
HOP_HEADERS = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer"}
PATHS = {
    "/train": ["POST"],
    "/train/{rest:path}": ["GET", "POST", "DELETE"],
    "/feedback": ["POST"],
    "/v1/chat/completions": ["GET"],
    "/v1/chat/completions/{rest:path}": ["GET", "DELETE"],
    "/checkpoint": ["POST"],
    "/checkpoint/{rest:path}": ["GET", "POST"],
    "/checkpoints": ["GET"],
    "/v1/files": ["GET", "POST"],
    "/v1/files/{rest:path}": ["GET", "DELETE"],
    "/v1/uploads": ["POST"],
    "/v1/uploads/{rest:path}": ["POST"],
    "/v1/fine_tuning/{rest:path}": ["GET", "POST", "DELETE"],
}
Frame = tunnel_messages.TunnelDown


NO_TRAINER = (
    "no trainer is running for this server; start one: torchrun --local-addr 127.0.0.1 --nproc-per-node P -m "
    "apollo_tp.launch (its coordinator answers these routes)"
)


class UnavailableError(Exception):
    """No coordinator answers. Becomes a 503 in this module."""


class Tunnel:
    """One DEALER to the coordinator, made on first use, shared by all requests of this event loop. ``folder`` is the
    server's; the coordinator listens at a socket in it, or is on another host, of which the trainer has left the address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = instance_folder.socket_path(folder, instance_folder.COORDINATOR_SOCKET)
        self._remote: tunnel_messages.CoordinatorAddress | None = None
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Queue[Frame]] = {}
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None

    def _connected(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            # only send over a live connection: a request that was answered 503 must not be delivered later
            self._socket.setsockopt(zmq.IMMEDIATE, 1)
            self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            if self._remote is None:
                self._socket.connect(f"ipc://{self._path}")
            else:
                self._socket.curve_serverkey = self._remote.server_key.encode()
                self._socket.curve_publickey = self._remote.public_key.encode()
                self._socket.curve_secretkey = self._remote.secret_key.encode()
                self._socket.connect(self._remote.address)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(self._socket))
        return self._socket

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frame = await socket.recv()
            with contextlib.suppress(FrameError):
                message = codec.decode(frame, tunnel_messages.TunnelDown)
                if message.id in self._open:
                    self._open[message.id].put_nowait(message)

    def begin(self) -> int:
        """A new request id with a queue for its answer."""
        remote = _remote_coordinator(self._folder)
        if remote != self._remote:  # another trainer than the last one
            self._disconnect()
            self._remote = remote
        if not ((remote or self._path.exists()) and _answers_soon(self._folder)):
            raise _absent(self._folder)
        identity = next(self._ids)
        self._open[identity] = asyncio.Queue()
        return identity

    def _disconnect(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        if self._socket is not None:
            self._socket.close()
        self._reader = self._socket = None

    async def send(self, message: tunnel_messages.TunnelUp) -> None:
        """Send one frame. Raises UnavailableError if nobody takes it in time."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._connected().send(codec.encode(message))
        except (TimeoutError, zmq.ZMQError) as error:
            raise _absent(self._folder) from error

    async def next(self, identity: int, seconds: float) -> Frame:
        """The next frame of an answer. Raises UnavailableError if none comes in time."""
        try:
            async with asyncio.timeout(seconds):
                return await self._open[identity].get()
        except TimeoutError:
            raise UnavailableError(f"the trainer's coordinator was silent for {seconds:.0f} s") from None

    async def close(self, identity: int, *, finished: bool) -> None:
        """Forget a request; notify the coordinator if it was not answered to its end."""
        self._open.pop(identity, None)
        if not finished:
            with contextlib.suppress(zmq.ZMQError):  # nobody there: nothing to cancel
                await self._connected().send(codec.encode(tunnel_messages.TunnelCancel(identity)), zmq.NOBLOCK)


def _remote_coordinator(folder: Path) -> tunnel_messages.CoordinatorAddress | None:
    """Where the coordinator is on another host; None if it listens in ``folder``, or if there is none."""
    try:
        content = (folder / instance_folder.TCP_FILE).read_bytes()
        return msgspec.json.decode(content, type=tunnel_messages.CoordinatorAddress)
    except (OSError, msgspec.DecodeError):
        return None


def _absent(folder: Path) -> UnavailableError:
    """Why the coordinator of this server does not answer."""
    if _answers_soon(folder):
        return UnavailableError("the trainer's coordinator does not answer yet: try again, and see the trainer's log")
    return UnavailableError(NO_TRAINER)


def _answers_soon(folder: Path) -> bool:
    """Whether the process lives that locked this server last as its trainer, or the coordinator that wrote down its address
    last."""
    with contextlib.suppress(OSError, ValueError):
        if processes.ProcessId.of(int((folder / instance_folder.TRAINER_LOCK).read_text())):
            return True
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        address = json.loads((folder / instance_folder.ADDRESS_FILE).read_text())
        return processes.ProcessId.of(address["pid"]) is not None
    return False


class ApolloEndpoints:
    """The object that vLLM's ``vllm.endpoint_plugins`` group expects: a name, required tasks, and two hooks."""

    name = "apollo"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._tunnel: Tunnel | None = None
        self._lock: UpdateLock | None = None
        self._switch: Path | None = None
        """The file that is there while a trainer runs that stores completions."""

    def attach_router(self, app: Any) -> None:
        """Add the forwarded routes to vLLM's application. Raises nothing: the server's start must not depend on us."""
        for path, methods in PATHS.items():
            app.add_route(path, self._forward, methods=methods, include_in_schema=False)
        app.add_middleware(CaptureMiddleware, is_on=lambda: self._switch is not None and self._switch.exists())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Listen for the trainer's update lock. The tunnel's socket is opened by the first request."""
        if engine_client is None:  # vLLM's render server has no weights
            return
        if reason := unclaimed():
            logger.warning("apollo_tp: this server cannot be trained: %s", reason)
            return
        from apollo_tp.vllm_plugin import chat
        from apollo_tp.vllm_plugin.compat.engine import Engine

        count = getattr(args, "api_server_count", None) or 1
        refusal = "" if count == 1 else (
            f"API server processes: got {count}, expected one, through which all requests pass; start vLLM with "
            "--api-server-count 1"
        )  # fmt: skip
        if num_engines() > 1:
            refusal = f"engines: got {num_engines()}, expected one, which can be paused; start one server for each"
        self._lock = UpdateLock(Engine(engine_client), refusal)
        try:
            path = instance_folder.socket_path(engine_folders()[0], instance_folder.SYNC_SOCKET)
            await self._lock.start(path)
        except (ConfigError, OSError) as error:  # serving must not depend on us; the trainer says what is missing
            logger.warning("apollo_tp: updates cannot pause this server: %s", error)
        mode = getattr(engine_client.vllm_config.model_config, "logprobs_mode", "raw_logprobs")
        Recorder(self._send_record, mode).attach(engine_client)
        try:
            self._switch = engine_folders()[0] / instance_folder.CAPTURE_FILE
            for folder in engine_folders():
                chat.publish_of_client(engine_client, args, folder)
        except (ConfigError, OSError) as error:
            logger.warning("apollo_tp: trainers cannot see that this server is ready: %s", error)

    async def _send_record(self, record: bytes) -> None:
        """Deliver a captured completion. Raises UnavailableError if the coordinator does not store it."""
        tunnel = self._find()
        identity = tunnel.begin()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(record)).encode())]
        try:
            await tunnel.send(tunnel_messages.TunnelRequest(identity, "POST", CAPTURES_PATH, b"", headers))
            for start in range(0, len(record), CHUNK_BYTES):
                part = record[start : start + CHUNK_BYTES]
                more = start + CHUNK_BYTES < len(record)
                await tunnel.send(tunnel_messages.TunnelBody(identity, part, more))
            while not isinstance(head := await tunnel.next(identity, ALIVE_SECONDS), tunnel_messages.TunnelHead):
                pass
            if head.status >= HTTPStatus.BAD_REQUEST:
                raise UnavailableError(f"the coordinator answered {head.status}")
        finally:
            await tunnel.close(identity, finished=True)

    def _find(self) -> Tunnel:
        if self._tunnel is None:
            if reason := unclaimed():
                raise UnavailableError(f"this server cannot be trained: {reason}")
            try:
                self._tunnel = Tunnel(engine_folders()[0])
            except (ConfigError, OSError) as error:
                raise UnavailableError(str(error)) from error
        return self._tunnel

    async def _forward(self, request: Request) -> Response:
        """One request, through the coordinator."""
        try:
            tunnel = self._find()
            identity = tunnel.begin()
        except UnavailableError as error:
            return _unavailable(error)
        answer: Response | None = None
        upload = asyncio.create_task(self._upload(tunnel, identity, request))
        try:
            answer = await self._answer(tunnel, identity, upload)
            return answer
        except UnavailableError as error:
            return _unavailable(error)
        finally:
            if answer is None:
                upload.cancel()
                await tunnel.close(identity, finished=False)

    async def _upload(self, tunnel: Tunnel, identity: int, request: Request) -> None:
        path, query, headers = _route_path(request), request.scope["query_string"], request.headers.raw
        # with --uds uvicorn knows no address, and None would mean that no token is needed
        client = request.client.host if request.client else "a unix socket"
        await tunnel.send(tunnel_messages.TunnelRequest(identity, request.method, path, query, list(headers), client))
        async for part in request.stream():
            for start in range(0, len(part), CHUNK_BYTES):
                await tunnel.send(tunnel_messages.TunnelBody(identity, part[start : start + CHUNK_BYTES], True))
        await tunnel.send(tunnel_messages.TunnelBody(identity, b"", False))

    async def _answer(self, tunnel: Tunnel, identity: int, upload: asyncio.Task[None]) -> Response:
        seconds = ACCEPT_SECONDS
        while True:
            frame = asyncio.create_task(tunnel.next(identity, seconds))
            try:
                await asyncio.wait({frame, upload}, return_when=asyncio.FIRST_COMPLETED)
                if not frame.done():
                    upload.result()  # raises if sending failed
                head = await frame
            except ClientDisconnect as error:
                raise UnavailableError("the client went away") from error
            finally:
                frame.cancel()
            seconds = ALIVE_SECONDS
            if isinstance(head, tunnel_messages.TunnelHead):
                break
        if not upload.done():
            upload.cancel()  # refused before its end; from here on the response listens for the client's disconnect
        headers = [(name, value) for name, value in head.headers if name.lower() not in HOP_HEADERS]
        response = StreamingResponse(self._body(tunnel, identity, upload), status_code=head.status)
        response.raw_headers = headers
        return response

    async def _body(self, tunnel: Tunnel, identity: int, upload: asyncio.Task[None]) -> AsyncIterator[bytes]:
        finished = False
        try:
            while not finished:
                frame = await tunnel.next(identity, ALIVE_SECONDS)
                if isinstance(frame, tunnel_messages.TunnelBody):
                    finished = not frame.more
                    yield frame.data  # continues when the client has read it, except for what the transport buffers
                    if not finished:
                        await tunnel.send(tunnel_messages.TunnelTaken(identity, len(frame.data)))
        finally:
            upload.cancel()
            await tunnel.close(identity, finished=finished)


def _route_path(request: Request) -> str:
    """The path by which the route was found: without ``--root-path``, which a proxy may or may not have removed already."""
    root, path = request.scope.get("root_path", ""), request.scope["path"]
    return str(path[len(root) :] if path.startswith(f"{root}/") else path)


def _unavailable(error: Exception) -> Response:
    details = {"message": str(error), "type": "server_error", "param": None, "code": "no_trainer"}
    return Response(
        json.dumps({"error": details}), status_code=503, media_type="application/json", headers={"Retry-After": "5"}
    )
