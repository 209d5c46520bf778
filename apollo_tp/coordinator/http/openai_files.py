"""The OpenAI files routes: JSONL uploads, kept under ids made here; a client's file name is shown, never used as a path."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import IO, Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from apollo_tp.coordinator.http.service import Service, choice, page, page_of
from apollo_tp.coordinator.jobs.store import StoredFile
from apollo_tp.errors import RequestError, refuse
from apollo_tp.runtime.owned_folder import fsync


def file_view(file: StoredFile) -> dict[str, Any]:
    """A FileObject."""
    view: dict[str, Any] = msgspec.to_builtins(file)
    return view | {"object": "file", "created_at": int(file.created_at), "status_details": None, "expires_at": None}


class FilesApi:
    """Handlers of /v1/files."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """The route table of this surface."""
        return [
            Route("/v1/files", self.create, methods=["POST"]),
            Route("/v1/files", self.list, methods=["GET"]),
            Route("/v1/files/{file_id}", self.retrieve, methods=["GET"]),
            Route("/v1/files/{file_id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", self.content, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Upload a JSONL file (multipart: ``file``, ``purpose=fine-tune``)."""
        store, limits = self._service.store, self._service.settings.service
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise refuse("Content-Type", "another type of body", "multipart/form-data")
        if len(store.files()) >= limits.max_files:
            raise refuse("file", f"{limits.max_files} files already", f"fewer than {limits.max_files}; delete some")
        try:
            form = await request.form(max_files=1, max_fields=8)
        except (MultiPartException, HTTPException) as error:
            raise refuse(
                "body", str(getattr(error, "detail", error)) or "a malformed form", "multipart/form-data"
            ) from error
        async with form_closing(form):
            upload, purpose = form.get("file"), form.get("purpose")
            if purpose != "fine-tune":
                raise refuse("purpose", repr(purpose)[:80], "'fine-tune'")
            if not isinstance(upload, UploadFile) or not upload.size:
                raise refuse("file", "an empty file" if isinstance(upload, UploadFile) else "no file", "a JSONL file")
            if upload.size > limits.max_file_bytes:
                raise refuse("file", f"{upload.size} bytes", f"at most {limits.max_file_bytes}", status=413)
            self._service.check_disk(upload.size)
            file = StoredFile(
                id=f"file-{secrets.token_hex(12)}",
                filename="".join(c for c in upload.filename or "file.jsonl" if c.isprintable())[-255:],
                bytes=upload.size,
                created_at=time.time(),
            )
            path = store.file_path(file.id)
            await asyncio.to_thread(_write, upload.file, path)
        try:
            store.add_file(file)
        except BaseException:
            path.unlink()
            raise
        return JSONResponse(file_view(file))

    async def list(self, request: Request) -> Response:
        """Files, newest first unless ``order`` is asc."""
        after, limit = page_of(request, most=10_000, usual=10_000)
        choice(request, "purpose", "fine-tune")  # no file has another
        files = self._service.store.files()
        if choice(request, "order", "desc", "asc") == "asc":
            files.reverse()
        found, more = page(files, after, limit)
        return JSONResponse({"object": "list", "data": [file_view(file) for file in found], "has_more": more})

    def _find(self, request: Request) -> StoredFile:
        file_id = request.path_params["file_id"]
        file = self._service.store.file(file_id)
        if file is None:
            raise RequestError(
                f"No such File object: {file_id[:64]}", field="file_id", got=file_id[:64],
                expected="the id of an uploaded file", status=404, code="no_such_file",
            )  # fmt: skip
        return file

    async def retrieve(self, request: Request) -> Response:
        """One file's record."""
        return JSONResponse(file_view(self._find(request)))

    async def delete(self, request: Request) -> Response:
        """Delete a file. Jobs that were validated have their own copy of the samples."""
        file = self._find(request)
        self._service.store.delete_file(file.id)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        """A file's content."""
        path = self._service.store.file_path(self._find(request).id)
        return FileResponse(path, media_type="application/octet-stream")


class form_closing:  # noqa: N801 - a context manager, as contextlib.aclosing
    """Close a form's temporary files."""

    def __init__(self, form: Any) -> None:
        self._form = form

    async def __aenter__(self) -> None:
        """Nothing to open."""

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self._form.close()


def _write(source: IO[bytes], path: Path) -> None:
    """Copy an upload, with fsync of the file and of its name. On a failure nothing of it stays."""
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
