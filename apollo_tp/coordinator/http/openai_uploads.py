"""The OpenAI uploads routes: a file that arrives in parts.

Parts are on disk; which of them belong together is only in memory. After a restart of the coordinator an upload that was not
completed is unknown, its parts are removed with the other orphans, and its client is told to begin again.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, field
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.http.bodies import copy_from, decode_body, file_in, form_of, write_file
from apollo_tp.coordinator.http.middleware import PART_BYTES
from apollo_tp.coordinator.http.openai_bodies import CompleteBody, UploadBody
from apollo_tp.coordinator.http.openai_files import add_file, check_count, check_purpose, file_view, new_file
from apollo_tp.coordinator.http.parameters import StrictRoute, json_body
from apollo_tp.coordinator.http.service import Service, ServiceParts
from apollo_tp.coordinator.http.work import uninterrupted
from apollo_tp.coordinator.jobs.job import StoredFile
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import refuse

MAX_PENDING = 64
LIFE_SECONDS = 3600.0
"""An upload that was not completed by then is removed, as OpenAI's."""
_FORM = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "binary"}}}
_PART = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@dataclass
class Upload:
    """One upload. ``parts`` are sizes by id; ``busy`` while its file is being put together."""

    asked: UploadBody
    id: str = field(default_factory=lambda: f"upload_{secrets.token_hex(12)}")
    created_at: float = field(default_factory=time.time)
    parts: dict[str, int] = field(default_factory=dict)
    status: str = "pending"
    file: StoredFile | None = None
    busy: bool = False

    @property
    def expires_at(self) -> float:
        return self.created_at + LIFE_SECONDS

    def view(self) -> dict[str, Any]:
        """The upload as OpenAI's Upload."""
        return {
            "id": self.id, "object": "upload", "bytes": self.asked.bytes, "created_at": int(self.created_at),
            "expires_at": int(self.expires_at), "filename": self.asked.filename, "purpose": self.asked.purpose,
            "status": self.status, "file": None if self.file is None else file_view(self.file),
        }  # fmt: skip


class Uploads:
    """All uploads that were begun, until their hour is over."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uploads: dict[str, Upload] = {}

    def begin(self, asked: UploadBody) -> Upload:
        """A new upload. Raises RequestError 429 beyond MAX_PENDING."""
        if sum(upload.status == "pending" for upload in self._uploads.values()) >= MAX_PENDING:
            raise refuse("uploads", f"{MAX_PENDING} pending uploads", "fewer; complete or cancel some", status=429,
                         code="too_many_uploads")  # fmt: skip
        upload = Upload(asked)
        self._uploads[upload.id] = upload
        return upload

    def pending(self, upload_id: str) -> Upload:
        """The upload of this id. Raises RequestError if it is unknown, or takes no further part."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise refuse("upload_id", repr(upload_id[:64]), "an upload of the last hour, begun since the coordinator "
                         "started; begin again", status=404, code="no_such_upload")  # fmt: skip
        if upload.status != "pending" or upload.busy:
            got = "an upload that is being completed" if upload.busy else f"an upload that is {upload.status}"
            raise refuse("upload_id", got, "a pending one; begin another", code="upload_not_pending")
        return upload

    def end(self, upload: Upload, status: str) -> None:
        """Remove the parts of an upload, which from now on is ``status``."""
        upload.status = status
        for part in upload.parts:
            self._store.disk.remove(self._store.file_path(part), f"{upload.id} is {status}")
        upload.parts.clear()

    def remove_expired(self) -> None:
        """Forget uploads whose hour is over, with their parts."""
        for upload in list(self._uploads.values()):
            if upload.expires_at < time.time() and not upload.busy:
                self.end(upload, "expired")
                del self._uploads[upload.id]


async def _uploads_of(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


UploadsParts = Annotated[Uploads, Depends(_uploads_of)]
router = APIRouter(prefix="/v1/uploads", route_class=StrictRoute)


@router.post("", openapi_extra=json_body(UploadBody))
async def create(request: Request, service: ServiceParts, uploads: UploadsParts) -> Response:
    """Begin an upload in parts."""
    asked = await decode_body(await request.body(), UploadBody)
    check_purpose(asked.purpose)
    check_count(service)
    if asked.bytes > (limit := service.settings.service.max_file_bytes):
        raise refuse("bytes", str(asked.bytes), f"at most {limit}", status=413, code="file_too_large")
    with service.storing(asked.bytes):
        return JSONResponse(uploads.begin(asked).view())


@router.post("/{upload_id}/parts", openapi_extra=_PART)
async def add_part(upload_id: str, request: Request, service: ServiceParts, uploads: UploadsParts) -> Response:
    """Add a part (multipart: `data`); several may arrive at the same time."""
    upload = uploads.pending(upload_id)
    async with form_of(request, ("data",)) as form:
        data, size = file_in(form, "data", "a part of the file", PART_BYTES)
        part = f"part_{secrets.token_hex(12)}"
        with service.storing(size):
            await write_file(service.store.file_path(part), copy_from(data.file))
    try:
        upload = uploads.pending(upload_id)
        if (total := sum(upload.parts.values()) + size) > upload.asked.bytes:
            raise refuse("data", f"{total} bytes in all parts", f"at most the {upload.asked.bytes} of the upload")
        upload.parts[part] = size
        service.store.disk.count(service.store.file_path(part))
    except BaseException:
        service.store.disk.remove(service.store.file_path(part), f"{upload_id} does not take it")
        raise
    view = {"id": part, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload.id}
    return JSONResponse(view)


@router.post("/{upload_id}/complete", openapi_extra=json_body(CompleteBody))
async def complete(upload_id: str, request: Request, service: ServiceParts, uploads: UploadsParts) -> Response:
    """Make a file of the parts, in the order of `part_ids`."""
    body = await decode_body(await request.body(), CompleteBody)
    upload = uploads.pending(upload_id)
    if unknown := next((part for part in body.part_ids if part not in upload.parts), None):
        raise refuse("part_ids", repr(unknown[:64]), "ids of this upload's parts")
    if len(set(body.part_ids)) < len(body.part_ids):
        raise refuse("part_ids", "an id twice", "each once")
    if (total := sum(upload.parts[part] for part in body.part_ids)) != upload.asked.bytes:
        raise refuse("part_ids", f"parts of {total} bytes", f"the {upload.asked.bytes} bytes of the upload")
    upload.busy = True
    try:
        upload.file = await _put_together(service, upload, body)
    finally:
        upload.busy = False
    uploads.end(upload, "completed")
    return JSONResponse(upload.view())


async def _put_together(service: Service, upload: Upload, body: CompleteBody) -> StoredFile:
    expires = upload.asked.expires_after
    file = new_file(upload.asked.filename, upload.asked.bytes, expires.seconds if expires else None)
    path = service.store.file_path(file.id)

    def write(target: IO[bytes]) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        for part in body.part_ids:
            with open(service.store.file_path(part), "rb") as source:
                while block := source.read(2**20):
                    digest.update(block)
                    target.write(block)
        if body.md5 is not None and digest.hexdigest() != body.md5.lower():
            raise refuse("md5", repr(body.md5[:64]), f"that of the parts, {digest.hexdigest()}; send them again")

    with service.storing(upload.asked.bytes):
        await write_file(path, write)
        await uninterrupted(add_file(service, file))
    return file


@router.post("/{upload_id}/cancel")
async def cancel(upload_id: str, uploads: UploadsParts) -> Response:
    """Drop an upload and its parts."""
    upload = uploads.pending(upload_id)
    uploads.end(upload, "cancelled")
    return JSONResponse(upload.view())
