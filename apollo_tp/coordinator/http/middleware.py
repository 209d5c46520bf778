"""ASGI middleware around every route, whichever port a request came by: access, limits per client, size and deadline of
bodies, the header with the weight version, and an answer to errors that no exception handler knows.

The last is one of the few places that catch every exception (another is the rank loop).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.http.auth import BROWSER_PAGES, Access
from apollo_tp.coordinator.http.errors import error_response
from apollo_tp.coordinator.http.page import PREFIX
from apollo_tp.errors import RequestError, refuse
from apollo_tp.wire.capture import CAPTURES_PATH

log = logging.getLogger(__name__)

WEIGHT_VERSION_HEADER = b"x-apollo-weight-version"
FRAMES_HEADER = (b"content-security-policy", b"frame-ancestors 'none'")
PAGE_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"cache-control", b"no-cache"),  # after an upgrade, files of different releases must not come together
    (b"x-content-type-options", b"nosniff"),
]
MULTIPART_BYTES = 64 * 1024
"""What a multipart body may have in addition to its file."""
PART_BYTES = 64 * 2**20
"""OpenAI's limit of one part of an upload."""
SMALL_BODY_BYTES = 2**20
"""Limit of bodies that carry no samples and no file."""
SAMPLE_ROUTES = ("/train", "/train/score", CAPTURES_PATH)
PART_ROUTE = re.compile(r"/v1/uploads/[^/]*/parts")
BODY_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 16 * 1024
"""A body is waited for BODY_SECONDS, and longer as far as it arrives at this rate."""
REQUESTS_PER_CLIENT = 256
"""Open at the same time: half of what the tunnel takes, so that no single client can keep the others out."""


class ServiceMiddleware:
    """Also adds the current weight version to every response, once it is known."""

    def __init__(
        self, app: ASGIApp, access: Access, limits: ServiceConfig, weight_version: Callable[[], int | None]
    ) -> None:
        self._app, self._access, self._limits, self._weight_version = app, access, limits, weight_version
        self._open: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(self._stamped(scope["path"], message))

        try:
            headers = Headers(scope=scope)
            address = scope["client"][0] if scope.get("client") else None
            self._access.check(scope["method"], scope["path"], headers, address)
            client = self._access.client_of(headers, address)
            state = {**scope.get("state", {}), "client": client, "head": scope["method"] == "HEAD"}
            if state["head"]:  # FastAPI's GET routes do not take it; the server leaves the body out
                scope = {**scope, "method": "GET"}
            scope = {**scope, "state": state}
            with self._counted(client):
                await self._app(scope, self._limited(scope["path"], headers, receive), watched_send)
        except Exception as error:
            if started:
                log.error("a response broke off", exc_info=error)
                return
            response = error_response(error)
            # on vLLM's port the page is at another path than what it asks for, so that browsers do not add the token at once
            asked_by_page = scope["path"] in BROWSER_PAGES or headers.get("sec-fetch-site") == "same-origin"
            if response.status_code == 401 and asked_by_page:
                response.headers["WWW-Authenticate"] = 'Basic realm="apollo_tp: any user, the token as password"'
            await response(scope, receive, watched_send)

    @contextlib.contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        if self._open[client] >= REQUESTS_PER_CLIENT:
            raise refuse("requests", f"{self._open[client]} of this client at the same time", "fewer; try again later",
                         status=429, code="too_many_requests")  # fmt: skip
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def _stamped(self, path: str, message: Message) -> Message:
        if message["type"] != "http.response.start":
            return message
        headers = list(message.get("headers", []))
        if (version := self._weight_version()) is not None:
            headers.append((WEIGHT_VERSION_HEADER, str(version).encode()))
        if path == "/" or path.startswith(f"{PREFIX}/"):
            headers += PAGE_HEADERS
        elif path.startswith("/docs"):
            headers.append(FRAMES_HEADER)
        return {**message, "headers": headers}

    def _limit(self, path: str) -> int:
        if path in SAMPLE_ROUTES:
            return self._limits.max_body_bytes
        if path == "/v1/files":
            return self._limits.max_file_bytes + MULTIPART_BYTES
        if PART_ROUTE.fullmatch(path):
            return PART_BYTES + MULTIPART_BYTES
        return min(self._limits.max_body_bytes, SMALL_BODY_BYTES)

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        if (encoding := headers.get("content-encoding", "identity")) != "identity":
            raise refuse("Content-Encoding", repr(encoding[:40]), "a body that is not compressed", status=415,
                         code="unsupported_encoding")  # fmt: skip
        limit = self._limit(path)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(declared, limit)
        seen, waited, complete = 0, 0.0, False

        async def limited() -> Message:
            nonlocal seen, waited, complete
            if complete:
                return await receive()  # until the client goes
            start = time.monotonic()
            try:
                # only time in which the client is waited for counts: what it sent may wait for its turn
                async with asyncio.timeout(max(0.0, BODY_SECONDS + seen / MIN_BYTES_PER_SECOND - waited)):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(seen, waited + time.monotonic() - start) from None
            waited += time.monotonic() - start
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > limit:
                raise _too_large(str(seen), limit)
            return message

        return limited


def _too_large(got: str, limit: int) -> RequestError:
    return refuse("body", f"{got} bytes or more", f"at most {limit} bytes", status=413, code="body_too_large")


def _too_slow(got: int, seconds: float) -> RequestError:
    expected = f"the whole body within {BODY_SECONDS:.0f} s, or {MIN_BYTES_PER_SECOND} bytes a second"
    return refuse("body", f"{got} bytes in {seconds:.0f} s", expected, status=408, code="body_too_slow")
