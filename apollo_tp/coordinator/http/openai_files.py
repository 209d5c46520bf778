"""The OpenAI files routes: JSONL uploads, kept under ids made here; a client's file name is shown, never used as a path."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from apollo_tp.coordinator.http.parameters import FilesQuery, StrictRoute
from apollo_tp.coordinator.http.service import Service, ServiceParts, found, listing, page_of
from apollo_tp.coordinator.http.work import uninterrupted
from apollo_tp.coordinator.jobs.job import StoredFile
from apollo_tp.coordinator.jobs.storage_error import StorageError, named
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import refuse
from apollo_tp.runtime.owned_folder import fsync

_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["fine-tune"]},
    },
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

router = APIRouter(prefix="/v1/files", route_class=StrictRoute)


def file_view(file: StoredFile) -> dict[str, Any]:
    """The file as OpenAI's FileObject."""
    view: dict[str, Any] = msgspec.to_builtins(file)
    return view | {"object": "file", "created_at": int(file.created_at), "status_details": None, "expires_at": None}


@router.post("", openapi_extra=_UPLOAD)
async def create(request: Request, service: ServiceParts) -> Response:
    """Upload a JSONL file (multipart: `file`, `purpose=fine-tune`)."""
    store, limits = service.store, service.settings.service
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise refuse("Content-Type", "another type of body", "multipart/form-data")
    if len(store.files()) >= limits.max_files:
        raise refuse("file", f"{limits.max_files} files already", f"fewer than {limits.max_files}; delete some")
    async with contextlib.AsyncExitStack() as stack:
        try:
            # not FastAPI's File and Form: these take a thousand fields, which stay in memory
            form = await stack.enter_async_context(request.form(max_files=1, max_fields=8))
        except HTTPException as error:
            raise refuse("body", error.detail or "a malformed form", "multipart/form-data") from error
        upload, purpose = form.get("file"), form.get("purpose")
        if purpose != "fine-tune":
            raise refuse("purpose", repr(purpose)[:80], "'fine-tune'")
        if not isinstance(upload, UploadFile) or not upload.size:
            raise refuse("file", "an empty file" if isinstance(upload, UploadFile) else "no file", "a JSONL file")
        if upload.size > limits.max_file_bytes:
            raise refuse("file", f"{upload.size} bytes", f"at most {limits.max_file_bytes}", status=413)
        service.check_disk(upload.size)
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            filename="".join(c for c in upload.filename or "file.jsonl" if c.isprintable())[-255:],
            bytes=upload.size,
            created_at=time.time(),
        )
        path = store.file_path(file.id)
        try:
            await asyncio.to_thread(_write, upload.file, path)
        except OSError as error:
            raise named(error, path.parent) from error
    await uninterrupted(_add(store, file, path))
    return JSONResponse(file_view(file))


async def _add(store: Store, file: StoredFile, path: Path) -> None:
    try:
        await store.add_file(file)
    except StorageError:
        await asyncio.to_thread(path.unlink)
        raise


@router.get("")
async def list_files(query: Annotated[FilesQuery, Query()], service: ServiceParts) -> Response:
    """Files, newest first unless `order` is asc."""
    files = service.store.files()
    if query.order == "asc":
        files.reverse()
    page, more = page_of(files, query)
    return JSONResponse(listing([file_view(file) for file in page], more))


@router.get("/{file_id}")
async def retrieve(file_id: str, service: ServiceParts) -> Response:
    """One file's record."""
    return JSONResponse(file_view(_find(service, file_id)))


@router.delete("/{file_id}")
async def delete(file_id: str, service: ServiceParts) -> Response:
    """Delete a file. Jobs that were validated have their own copy of the samples."""
    file = _find(service, file_id)
    await uninterrupted(service.store.delete_file(file.id))
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


@router.get("/{file_id}/content", response_class=FileResponse)
async def content(file_id: str, service: ServiceParts) -> Response:
    """A file's content."""
    path = service.store.file_path(_find(service, file_id).id)
    return FileResponse(path, media_type="application/octet-stream")


def _find(service: Service, file_id: str) -> StoredFile:
    return found(service.store.file(file_id), "file", file_id)


def _write(source: IO[bytes], path: Path) -> None:
    """Copy an upload, with fsync of the file and of its name. An incomplete copy is removed."""
    source.seek(0)
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as target:
        try:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
            fsync(path.parent)
        except BaseException:
            path.unlink()
            raise
