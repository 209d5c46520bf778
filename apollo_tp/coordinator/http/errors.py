"""Errors as HTTP answers: one table of statuses, one form of body."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.http.work import ClientGoneError
from apollo_tp.coordinator.jobs.rank_link import RanksGoneError
from apollo_tp.coordinator.jobs.storage_error import StorageError
from apollo_tp.errors import DeadlineError, RankFailedError, RequestError

log = logging.getLogger(__name__)

STATUS: dict[type[Exception], tuple[int | None, str | None]] = {
    RequestError: (None, None),
    StorageError: (None, None),
    ClientGoneError: (499, "client_gone"),
    RanksGoneError: (503, "no_trainer"),
    DeadlineError: (504, "deadline"),
    RankFailedError: (500, "rank_failed"),
    RequestValidationError: (400, "invalid_request"),
    HTTPException: (None, "http"),
    ClientDisconnect: (
        400,
        "client_disconnected",
    ),  # nobody reads the answer; without this line each one is a traceback
}
"""Exception class -> (status, code); None: the error carries its own. The first class that fits counts."""
NO_ROUTE = (
    "got no route of the trainer, expected one of GET /openapi.json; completions are the model server's, on its port"
)


class ErrorDetails(BaseModel):
    """What was wrong. ``param`` (OpenAI's name) equals ``field``; ``id`` finds an internal error in the log."""

    message: str
    type: str
    code: str
    param: str | None = None
    field: str | None = None
    got: str | None = None
    expected: str | None = None
    id: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetails


def error_response(error: Exception) -> Response:
    """The JSON body and status of an error; 500 with an id, logged, for an unforeseen one."""
    known = next((found for kind, found in STATUS.items() if isinstance(error, kind)), None)
    if known is None:
        identity = secrets.token_hex(6)
        log.error("unhandled error %s", identity, exc_info=error)
        message = f"internal error {identity}; the coordinator's log has the details"
        details = {"message": message, "type": "server_error", "param": None, "code": "internal", "id": identity}
        return JSONResponse({"error": details}, status_code=500)
    status = known[0] or int(getattr(error, "status", 0) or getattr(error, "status_code", 500))
    headers = dict(getattr(error, "headers", None) or {})
    details = {
        "message": str(getattr(error, "detail", None) or error),
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": None,
        "code": known[1] or getattr(error, "code", None),
    }
    if isinstance(error, RequestError):
        details |= {"param": error.field, "code": error.code, "field": error.field}
        details |= {"got": error.got, "expected": error.expected}
    if status in (429, 503):
        headers["Retry-After"] = "5"
    if status == 408:
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse({"error": details}, status_code=status, headers=headers)


async def handle_error(request: Any, error: Exception) -> Response:
    """FastAPI's exception handler for the classes of the table."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error.detail = f"{request.method} {request.scope['path'][:200]}: {NO_ROUTE}"
    return error_response(error)
