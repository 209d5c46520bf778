"""ASGI middleware around every route, whichever port a request came by: access, body limits, the header with the weight
version, and an answer to errors that no exception handler knows.

The last is one of the few places that catch every exception (another is the rank loop).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.errors import error_response
from apollo_tp.errors import RequestError, refuse

log = logging.getLogger(__name__)

WEIGHT_VERSION_HEADER = b"x-apollo-weight-version"
MULTIPART_BYTES = 64 * 1024
"""What a multipart body may have in addition to its file."""
BROWSER_PAGES = ("/", "/docs")


class ServiceMiddleware:
    """Also adds the current weight version to every response, once it is known."""

    def __init__(
        self, app: ASGIApp, access: Access, limits: ServiceConfig, weight_version: Callable[[], int | None]
    ) -> None:
        self._app, self._access, self._limits, self._weight_version = app, access, limits, weight_version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(self._stamped(message))

        try:
            headers = Headers(scope=scope)
            client = scope["client"][0] if scope.get("client") else None
            self._access.check(scope["method"], scope["path"], headers, client)
            if scope["method"] == "HEAD":  # FastAPI's GET routes do not take it; the server leaves the body out
                scope = {**scope, "method": "GET"}
            await self._app(scope, self._limited(scope["path"], headers, receive), watched_send)
        except Exception as error:
            if started:
                log.error("a response broke off", exc_info=error)
                return
            response = error_response(error)
            if response.status_code == 401 and scope["path"] in BROWSER_PAGES:
                response.headers["WWW-Authenticate"] = 'Basic realm="apollo_tp: any user, the token as password"'
            await response(scope, receive, watched_send)

    def _stamped(self, message: Message) -> Message:
        version = self._weight_version()
        if message["type"] != "http.response.start" or version is None:
            return message
        stamp = (WEIGHT_VERSION_HEADER, str(version).encode())
        return {**message, "headers": [*message.get("headers", []), stamp]}

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        limit = self._limits.max_body_bytes
        if path == "/v1/files":
            limit = self._limits.max_file_bytes + MULTIPART_BYTES
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(declared, limit)
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(str(seen), limit)
            return message

        return limited


def _too_large(got: str, limit: int) -> RequestError:
    return refuse("body", f"{got} bytes or more", f"at most {limit} bytes", status=413, code="body_too_large")
