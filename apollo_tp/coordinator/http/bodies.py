"""Request bodies: large ones, JSON whose errors name what was probably meant, multipart forms, files as they are written."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, TypeVar

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from apollo_tp.coordinator.http.openai_bodies import Hyperparameters
from apollo_tp.coordinator.jobs.storage_error import named
from apollo_tp.coordinator.samples.field_names import meant_by
from apollo_tp.coordinator.samples.schema import Body, decode
from apollo_tp.errors import RequestError, refuse
from apollo_tp.runtime.owned_folder import fsync

T = TypeVar("T")
NESTED = "hyperparameters."
HYPERPARAMETERS = Hyperparameters.__struct_fields__
MEMORY_BYTES = 2**20
"""Larger bodies wait on disk for their turn."""
MAX_WAITING = 16
DECODED_AT_ONCE = 16 * 1024
"""Longer bodies take more than a few milliseconds to look through."""


class LargeBodies:
    """Bodies of samples, of which only one large one is worked on at a time; the others are in unnamed files meanwhile,
    which no crash leaves behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = asyncio.Lock()
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[Body]:
        """The body of a request; for a large one, the block is its turn. Raises RequestError 429 if too many wait."""
        parts: list[bytes] = []
        size, stream = 0, request.stream()
        async for part in stream:
            parts.append(part)
            if (size := size + len(part)) > MEMORY_BYTES:
                break
        else:
            yield b"".join(parts)
            return
        if self._waiting >= MAX_WAITING:
            raise refuse("body", f"more than {MAX_WAITING} large bodies at once", "fewer; try again later", status=429,
                         code="too_many_bodies")  # fmt: skip
        self._waiting += 1
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                try:
                    await _spool(parts, stream, file)
                except OSError as error:
                    raise named(error, self._folder) from error
                async with self._turn:
                    yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        finally:
            self._waiting -= 1


async def _spool(parts: list[bytes], stream: AsyncIterator[bytes], file: IO[bytes]) -> None:
    """Write ``parts`` and the rest of ``stream``, a piece at a time and on a worker thread."""
    size = sum(map(len, parts))
    async for part in stream:
        parts.append(part)
        if (size := size + len(part)) >= MEMORY_BYTES:
            await asyncio.to_thread(file.writelines, parts)
            parts.clear()
            size = 0
    file.writelines(parts)
    parts.clear()
    file.flush()


async def decode_body(data: bytes, type: type[T]) -> T:
    """The body as ``type``; a long one on a worker thread, so that others are answered meanwhile.

    Raises RequestError; for an unknown field, with the name that was probably meant.
    """
    if len(data) <= DECODED_AT_ONCE:
        return _decode_body(data, type)
    return await asyncio.to_thread(_decode_body, data, type)


def _decode_body(data: bytes, type: type[T]) -> T:
    try:
        return decode(data, type)
    except RequestError as error:
        raise advised(error, type) from error


def advised(error: RequestError, type: type) -> RequestError:
    """``error``; if it is about an unknown field for which ``type`` has another name or place, one that says so."""
    field = error.field or ""
    name = field.rpartition(".")[2]
    if error.got != f"unknown field {name!r}":
        return error
    known = getattr(type, "__struct_fields__", ())
    meant = meant_by(name, HYPERPARAMETERS if NESTED in f"{field}." else known)
    if not meant and field == name and "method" in known:
        ours = name if name in HYPERPARAMETERS else meant_by(name, HYPERPARAMETERS)
        meant = ours and f"method.supervised.{NESTED}{ours}"
    return refuse(field, f"unknown field {name!r}", meant, code=error.code) if meant else error


@contextlib.asynccontextmanager
async def form_of(request: Request, fields: tuple[str, ...]) -> AsyncIterator[dict[str, UploadFile | str]]:
    """The fields of a multipart form with at most one file. Raises RequestError for a malformed form, for a field that is
    not among ``fields``, and for one that comes twice."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise refuse("Content-Type", "another type of body", "multipart/form-data")
    async with contextlib.AsyncExitStack() as stack:
        try:
            # not FastAPI's File and Form: these take a thousand fields, which stay in memory
            form = await stack.enter_async_context(request.form(max_files=1, max_fields=8))
        except HTTPException as error:
            raise refuse("body", error.detail or "a malformed form", "multipart/form-data") from error
        found: dict[str, UploadFile | str] = {}
        for name, value in form.multi_items():
            if name not in fields:
                raise refuse(name[:80], "an unknown form field", f"one of {', '.join(fields)}")
            if name in found:
                raise refuse(name, "it twice", "it once")
            found[name] = value
        yield found


def file_in(form: dict[str, UploadFile | str], name: str, kind: str, limit: int) -> tuple[UploadFile, int]:
    """The uploaded file of a form and its size. Raises RequestError if it is missing, empty or larger than ``limit``."""
    upload = form.get(name)
    if not isinstance(upload, UploadFile) or not upload.size:
        raise refuse(name, "an empty file" if isinstance(upload, UploadFile) else "no file", kind)
    if upload.size > limit:
        raise refuse(name, f"{upload.size} bytes", f"at most {limit}", status=413, code="file_too_large")
    return upload, upload.size


async def write_file(path: Path, write: Callable[[IO[bytes]], T]) -> T:
    """Create ``path`` with what ``write`` writes, flushed to disk, on a worker thread; returns what ``write`` returns.
    Nothing is left of it if that fails, or if the client goes meanwhile."""
    written = asyncio.ensure_future(asyncio.to_thread(_write_file, path, write))
    try:
        return await asyncio.shield(written)
    except asyncio.CancelledError:
        written.add_done_callback(lambda _: path.unlink(missing_ok=True))  # the thread cannot be stopped
        raise


def _write_file(path: Path, write: Callable[[IO[bytes]], T]) -> T:
    try:
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as target:
            result = write(target)
            target.flush()
            os.fsync(target.fileno())
        fsync(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return result


def copy_from(source: IO[bytes]) -> Callable[[IO[bytes]], None]:
    """For ``write_file``: all of ``source``."""

    def write(target: IO[bytes]) -> None:
        source.seek(0)
        shutil.copyfileobj(source, target, 2**20)

    return write
