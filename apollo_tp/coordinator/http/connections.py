"""Bounds on what clients of the TCP port may hold: connections, unfinished headers, answers that nobody reads.

uvicorn has none of them: ``limit_concurrency`` refuses requests and not connections, ``timeout_keep_alive`` begins after
the first answer and ends with the first byte of the next request, and httptools takes headers of any size. Bodies have a
deadline in middleware.py, which requests through vLLM's port pass too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
from http import HTTPStatus

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

MAX_FILES = 65_536
MAX_CONNECTIONS = 1024
ACCEPTED_AT_ONCE = 16
"""asyncio accepts so many connections before the first of them is counted."""
BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted."""
HEAD_SECONDS = 10.0
"""The first request, and each further one, is complete up to its body this long after the server began to wait for it."""
MAX_HEAD_BYTES = 64 * 1024
UNREAD_SECONDS = 300.0
"""A client that reads nothing of its answer for so long counts as gone."""


def raise_file_limit() -> int:
    """Raise the soft limit of open files as far as the hard one allows, and return it: many shells set it to 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(
            ValueError, OSError
        ):  # refused by a sandbox: the limit of connections follows the old one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def connection_limit(max_files: int) -> int:
    """How many connections are accepted if the process may open ``max_files`` files: half of them at most."""
    return min(MAX_CONNECTIONS, max_files // 2)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a deadline for heads and for unread answers, and a limit of connections.

    A connection beyond the limit takes the place of the one that has waited longest for its client; if all have a request
    in progress, it is answered 503.
    """

    max_connections = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._in_head, self._head_bytes = True, 0
        self._unread: asyncio.TimerHandle | None = None
        self._await_head()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_deadline.cancel()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._waits_since = self.loop.time()
        self._head_deadline = self.loop.call_later(HEAD_SECONDS, self._close)

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    @property
    def _waits(self) -> bool:
        """Whether the next move is the client's: no request has begun, or all have been answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _make_room(self) -> None:
        others = [each for each in self.connections if isinstance(each, BoundedProtocol) and each is not self]
        waiting = min((each for each in others if each._waits), key=lambda each: each._waits_since, default=None)
        if waiting is not None:
            waiting.transport.close()
            return
        self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections",
                     f"connections: got more than {self.max_connections} with a request in progress, expected fewer; "
                     "try again later")  # fmt: skip

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        details = {"message": message, "type": kind, "param": None, "code": code}
        body = json.dumps({"error": details}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large",
                    f"headers: got more than {MAX_HEAD_BYTES} bytes, expected at most that; send fewer or shorter ones",
                )  # fmt: skip

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_deadline.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._waits:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class BoundedServer(uvicorn.Server):
    """uvicorn for one application, with bounded connections. It leaves signals to its caller."""

    def __init__(self, app: ASGIApp, graceful_seconds: int) -> None:
        limit = connection_limit(raise_file_limit())
        protocol = type("Protocol", (BoundedProtocol,), {"max_connections": limit})
        super().__init__(
            uvicorn.Config(
                app, http=protocol, ws="none", log_config=None, access_log=False, lifespan="off", proxy_headers=False,
                backlog=ACCEPTED_AT_ONCE, timeout_graceful_shutdown=graceful_seconds,
            )
        )  # fmt: skip

    def install_signal_handlers(self) -> None:
        pass

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)  # asyncio gave the kernel's queue the length ACCEPTED_AT_ONCE
