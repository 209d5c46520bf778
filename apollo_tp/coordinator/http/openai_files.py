"""The OpenAI files routes: JSONL uploads, kept under ids made here; a client's file name is shown, never used as a path."""

from __future__ import annotations

import functools
import secrets
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from apollo_tp.coordinator.http.bodies import copy_from, file_in, form_of, write_file
from apollo_tp.coordinator.http.openai_bodies import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from apollo_tp.coordinator.http.openai_results import job_of, results_csv, results_view
from apollo_tp.coordinator.http.parameters import PURPOSE, FilesQuery, StrictRoute
from apollo_tp.coordinator.http.service import Service, ServiceParts, found, listing, page_of
from apollo_tp.coordinator.http.work import uninterrupted
from apollo_tp.coordinator.jobs.job import StoredFile
from apollo_tp.errors import refuse

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": MIN_EXPIRY_SECONDS, "maximum": MAX_EXPIRY_SECONDS},
    },
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

router = APIRouter(prefix="/v1/files", route_class=StrictRoute)


def file_view(file: StoredFile) -> dict[str, Any]:
    """The file as OpenAI's FileObject."""
    view: dict[str, Any] = msgspec.to_builtins(file)
    expires = None if file.expires_at is None else int(file.expires_at)
    return view | {
        "object": "file",
        "created_at": int(file.created_at),
        "status_details": None,
        "expires_at": expires,
    }


def new_file(filename: str, num_bytes: int, expires_after: int | None) -> StoredFile:
    """The record of a file with an id of its own. It is not stored."""
    now = time.time()
    return StoredFile(
        id=f"file-{secrets.token_hex(12)}",
        filename="".join(c for c in filename if c.isprintable())[-255:] or "file.jsonl",
        bytes=num_bytes,
        created_at=now,
        expires_at=None if expires_after is None else now + expires_after,
    )


def check_purpose(purpose: object) -> None:
    """Raise RequestError unless files of this purpose are of use here."""
    if purpose != PURPOSE:
        raise refuse("purpose", repr(purpose)[:80], f"{PURPOSE!r}")


def check_count(service: Service) -> None:
    """Raise RequestError if there may be no further file."""
    limit = service.settings.service.max_files
    if service.store.count_files() >= limit:
        raise refuse("file", f"{limit} files already", f"fewer than {limit}; delete some")


async def add_file(service: Service, file: StoredFile) -> None:
    """Store the record of a file whose content has been written; the content is removed if that fails."""
    try:
        async with service.adding_file:
            check_count(service)  # others may have been stored while this one arrived
            await service.store.add_file(file)
    except BaseException:
        service.store.disk.remove(service.store.file_path(file.id), f"{file.id} could not be stored")
        raise


@router.post("", openapi_extra=_UPLOAD)
async def create(request: Request, service: ServiceParts) -> Response:
    """Upload a JSONL file (multipart: `file`, `purpose=fine-tune`, and `expires_after[...]`)."""
    check_count(service)
    declared = request.headers.get("content-length", "")
    with service.storing(int(declared) if declared.isdigit() else 0):
        async with form_of(request, ("file", "purpose", ANCHOR, SECONDS)) as form:
            check_purpose(form.get("purpose"))
            expires_after = _expires_after(form)
            upload, size = file_in(form, "file", "a JSONL file", service.settings.service.max_file_bytes)
            file = new_file(upload.filename or "", size, expires_after)
            with service.storing(0 if declared.isdigit() else size):
                await write_file(service.store.file_path(file.id), copy_from(upload.file))
                await uninterrupted(add_file(service, file))
    return JSONResponse(file_view(file))


def _expires_after(form: dict[str, UploadFile | str]) -> int | None:
    anchor, seconds = form.get(ANCHOR), form.get(SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise refuse(ANCHOR, "nothing" if anchor is None else repr(anchor)[:80], "'created_at'")
    if not isinstance(seconds, str) or not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10) \
            or not MIN_EXPIRY_SECONDS <= int(seconds) <= MAX_EXPIRY_SECONDS:  # fmt: skip
        expected = f"seconds from {MIN_EXPIRY_SECONDS} (an hour) to {MAX_EXPIRY_SECONDS} (30 days)"
        raise refuse(SECONDS, "nothing" if seconds is None else repr(seconds)[:80], expected)
    return int(seconds)


@router.get("")
async def list_files(query: Annotated[FilesQuery, Query()], service: ServiceParts) -> Response:
    """Uploaded files, newest first unless `order` is asc."""
    files = [file for file in service.store.files() if query.purpose in (None, file.purpose)]
    if query.order == "asc":
        files.reverse()
    page, more = page_of(files, query)
    return JSONResponse(listing([file_view(file) for file in page], more))


@router.get("/{file_id}")
async def retrieve(file_id: str, service: ServiceParts) -> Response:
    """One file's record."""
    if job := job_of(service.store, file_id):
        content = await service.store.in_thread(functools.partial(results_csv, job=job))
        return JSONResponse(results_view(job, len(content)))
    return JSONResponse(file_view(_find(service, file_id)))


@router.delete("/{file_id}")
async def delete(file_id: str, service: ServiceParts) -> Response:
    """Delete a file. Jobs that were validated have their own copy of the samples."""
    if job_of(service.store, file_id):
        raise refuse("file_id", "a result file", "the id of an uploaded file; a job's results are part of its record")
    file = _find(service, file_id)
    await uninterrupted(service.store.delete_file(file.id))
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


@router.get("/{file_id}/content", response_class=FileResponse)
async def content(file_id: str, service: ServiceParts) -> Response:
    """A file's content; of a result file, CSV."""
    if job := job_of(service.store, file_id):
        return Response(await service.store.in_thread(functools.partial(results_csv, job=job)), media_type="text/csv")
    path = service.store.file_path(_find(service, file_id).id)
    return FileResponse(path, media_type="application/octet-stream")


def _find(service: Service, file_id: str) -> StoredFile:
    return found(service.store.file(file_id), "file", file_id)
