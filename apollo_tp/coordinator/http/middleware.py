"""What surrounds every route, whichever port a request came by: access, names in the query, body limits, and errors as JSON.

This is one of the two places that catch every exception (the other is the rank loop).
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.openapi import check_query
from apollo_tp.coordinator.jobs.rank_link import RanksGoneError
from apollo_tp.errors import DeadlineError, RankFailedError, RequestError

log = logging.getLogger(__name__)

# exception class -> (status, code); None: the error carries its own. The first match from above counts.
STATUS: list[tuple[type[Exception], int | None, str | None]] = [
    (RequestError, None, None),
    (RanksGoneError, 503, "no_trainer"),
    (DeadlineError, 504, "deadline"),
    (RankFailedError, 500, "rank_failed"),
    (HTTPException, None, "http"),
]

WEIGHT_VERSION_HEADER = b"x-apollo-weight-version"


def error_response(error: Exception) -> Response:
    """The JSON body and status of an error; 500 with an id, logged, for one that nobody foresaw."""
    known = next(((status, code) for kind, status, code in STATUS if isinstance(error, kind)), None)
    if known is None:
        identity = secrets.token_hex(6)
        log.error("unhandled error %s", identity, exc_info=error)
        message = f"internal error {identity}; the coordinator's log has the details"
        return _body(
            500, {"message": message, "type": "server_error", "param": None, "code": "internal", "id": identity}
        )
    code = known[1]
    status = known[0] or int(getattr(error, "status", 0) or getattr(error, "status_code", 500))
    headers = dict(getattr(error, "headers", None) or {})
    details: dict[str, Any] = {
        "message": str(getattr(error, "detail", None) or error),
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": None,
        "code": code,
    }
    if isinstance(error, RequestError):
        details |= {"param": error.field, "code": error.code, "field": error.field}
        details |= {"got": error.got, "expected": error.expected}
    if status in (429, 503):
        headers["Retry-After"] = "5"
    return _body(status, details, headers)


def _body(status: int, details: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": details}, status_code=status, headers=headers)


class Edge:
    """ASGI middleware around the routes. Every answer names the ``weight_version`` of its moment, once there is one."""

    def __init__(
        self,
        app: Starlette,
        access: Access,
        max_body_bytes: int,
        max_file_bytes: int,
        weight_version: Callable[[], int | None],
    ) -> None:
        self._app, self._access, self._weight_version = app, access, weight_version
        self._max_body_bytes, self._max_file_bytes = max_body_bytes, max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
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
            check_query(scope, self._app.routes)
            await self._app(scope, self._limited(scope["path"], headers, receive), watched_send)
        except Exception as error:
            if started:
                log.error("a response broke off", exc_info=error)
                return
            response = error_response(error)
            if response.status_code == 401 and scope["path"] == "/":
                response.headers["WWW-Authenticate"] = 'Basic realm="apollo_tp: any user, the token as password"'
            await response(scope, receive, watched_send)

    def _stamped(self, message: Message) -> Message:
        version = self._weight_version()
        if message["type"] != "http.response.start" or version is None:
            return message
        stamp = (WEIGHT_VERSION_HEADER, str(version).encode())
        return {**message, "headers": [*message.get("headers", []), stamp]}

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        limit = self._max_body_bytes
        if path == "/v1/files":
            limit = self._max_file_bytes + 64 * 1024  # the multipart frame around the file
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
    return RequestError(
        f"body: got {got} bytes or more, expected at most {limit}", field="body", got=f"{got} bytes or more",
        expected=f"at most {limit} bytes", status=413, code="body_too_large",
    )  # fmt: skip


def log_format(record: logging.LogRecord) -> str:
    """A log record as one line of JSON."""
    line = {
        "time": record.created,
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    if record.exc_info:
        line["exception"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(line)
