"""Errors as HTTP answers: one table of statuses, one form of body."""

from __future__ import annotations

import logging
import secrets
import sqlite3
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.jobs.rank_link import RanksGoneError
from apollo_tp.errors import DeadlineError, RankFailedError, RequestError, refuse
from apollo_tp.runtime.owned_folder import FULL_DISK

log = logging.getLogger(__name__)

STATUS: dict[type[Exception], tuple[int | None, str | None]] = {
    RequestError: (None, None),
    RanksGoneError: (503, "no_trainer"),
    DeadlineError: (504, "deadline"),
    RankFailedError: (500, "rank_failed"),
    RequestValidationError: (400, "invalid_request"),
    HTTPException: (None, "http"),
}
"""Exception class -> (status, code); None: the error carries its own. The first class that fits counts."""


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
    if is_full(error):
        error = no_room(None, None)
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
        "code": known[1],
    }
    if isinstance(error, RequestError):
        details |= {"param": error.field, "code": error.code, "field": error.field}
        details |= {"got": error.got, "expected": error.expected}
    if status in (429, 503):
        headers["Retry-After"] = "5"
    if status == 408:
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse({"error": details}, status_code=status, headers=headers)


def is_full(error: Exception) -> bool:
    """Whether ``error`` says that the disk is full."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in FULL_DISK


def no_room(needed: int | None, free: int | None) -> RequestError:
    """A RequestError 507: the disk has no room for what a request brings. None: not known here."""
    got = "a full disk" if needed is None else f"{needed} bytes to store, where {free} are free"
    return refuse("body", got, "that much free space and some more below service.state_dir; delete files", status=507,
                  code="disk_full")  # fmt: skip


async def handle_error(request: Any, error: Exception) -> Response:
    """FastAPI's exception handler for the classes of the table."""
    return error_response(error)
