"""The server's end of the update lock: pauses vLLM while trainer rank 0 writes, and refreshes the prefix cache afterwards.

One trainer connection at a time, over a 0600 unix socket in the instance's private folder. The lock is a lease: when
the connection ends, or no message comes for ``lease_seconds``, the server is resumed from here, whatever became of the
trainer. A pause that another client asked for (vLLM's /pause) stays; requests of others during ours are handled after
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Protocol

import msgspec

from apollo_tp.config import CacheMode, SyncMode
from apollo_tp.errors import FrameError
from apollo_tp.runtime.owned_folder import free_socket
from apollo_tp.wire import codec
from apollo_tp.wire import update_lock as lock_messages

logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only

WRITE_SECONDS = 5.0
"""How long the trainer may take to read an answer before its connection is closed."""


class PausableEngine(Protocol):
    """The part of vLLM's engine that is used; ``compat.engine.Engine``."""

    async def acquire(self) -> None: ...
    async def pause(self, *, drain: bool) -> None: ...
    async def resume(self) -> None: ...
    async def reset_prefix_cache(self) -> None: ...
    async def label_weights(self, version: str) -> None: ...
    def salt_requests(self, salt: str) -> None: ...


class UpdateLock:
    """Listens from ``start`` on. ``refusal`` says why this server cannot be paused ("" if it can).

    Methods that return ``str | None`` return what went wrong, for the answer to the trainer.
    """

    def __init__(
        self, engine: PausableEngine, refusal: str = "", lease_seconds: float = lock_messages.SYNC_LEASE_SECONDS
    ) -> None:
        self._engine, self._refusal, self._lease_seconds = engine, refusal, lease_seconds
        self._attached: lock_messages.SyncAttach | None = None
        self._pausing: asyncio.Task[None] | None = None
        """The task that pauses, or has paused, the server; None once the pause is over or was given up."""
        self._expired = False
        self._num_salts = 0
        self._server: asyncio.Server | None = None

    async def start(self, path: Path) -> None:
        """Listen at ``path``; only this user can connect."""
        free_socket(path)
        previous = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, path)
        finally:
            os.umask(previous)

    async def close(self) -> None:
        """Stop listening. Connections end on their own."""
        if self._server:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        attached = False
        try:
            error = self._attach(await self._next_request(reader))
            attached = error is None
            if attached:
                error = await self._refresh()
            await _answer(writer, "SyncAttach", error)
            while attached:
                await self._handle(await self._next_request(reader), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the trainer left
        except (TimeoutError, FrameError, ValueError) as error:
            logger.warning("apollo_tp: the update lock's connection is closed: %s", error)
            writer.transport.abort()  # close would wait until the trainer has read what was sent
        finally:
            writer.close()
            if attached:
                await self._detach()

    async def _next_request(self, reader: asyncio.StreamReader) -> lock_messages.SyncRequest:
        """The next request. During a pause it must come within the lease; otherwise the server is resumed first."""
        frame = asyncio.ensure_future(_read(reader))
        try:
            if self._pausing is not None:
                done, _ = await asyncio.wait({frame}, timeout=self._lease_seconds)
                if not done:
                    logger.error(
                        "apollo_tp: got no message of the trainer for %.0f s while it has the server paused, expected one "
                        "every %.1f s; resumed", self._lease_seconds, lock_messages.SYNC_RENEW_SECONDS,
                    )  # fmt: skip
                    self._expired = True
                    await self._resume()
            request: lock_messages.SyncRequest = codec.decode(await frame, lock_messages.SyncRequest)
            return request
        finally:
            frame.cancel()

    async def _handle(self, request: lock_messages.SyncRequest, writer: asyncio.StreamWriter) -> None:
        match request:
            case lock_messages.SyncPause():
                if self._pausing is not None:
                    raise ValueError("got SyncPause, expected SyncRelease: the server is paused already")
                self._expired = False
                self._pausing = asyncio.create_task(self._pause(writer))
            case lock_messages.SyncRelease():
                await _answer(writer, "SyncRelease", await self._release(request.weight_version))
            case lock_messages.SyncRenew():
                pass
            case _:
                raise ValueError(f"got {type(request).__name__}, expected it once, at the beginning")

    def _attach(self, request: lock_messages.SyncRequest) -> str | None:
        """Accept the one trainer; returns why it is refused."""
        if not isinstance(request, lock_messages.SyncAttach):
            raise ValueError(f"got {type(request).__name__}, expected SyncAttach first")
        SyncMode(request.mode), CacheMode(request.cache)
        if self._refusal:
            return self._refusal
        if self._attached is not None:
            return "got a second trainer, expected one; stop the other one"
        self._attached = request
        self._engine.salt_requests("")  # ends the salt of a previous trainer
        return None

    async def _detach(self) -> None:
        """The trainer is gone, perhaps in the middle of a write: resume, and keep its half step out of the cache."""
        was_paused = self._pausing is not None
        try:
            if await self._resume():
                return  # vLLM's engine has ended: there is no cache either
            await self._refresh()
        finally:
            self._attached = None
        logger.log(
            logging.WARNING if was_paused else logging.INFO,
            "apollo_tp: the trainer left%s", " while the server was paused; resumed" if was_paused else "",
        )  # fmt: skip

    async def _pause(self, writer: asyncio.StreamWriter) -> None:
        """The task of one pause: pause the engine, then answer."""
        task = asyncio.current_task()
        error = await self._ask_engine(self._pause_engine(task), "vLLM did not pause")
        if self._pausing is task:
            with contextlib.suppress(ConnectionError, TimeoutError):  # the reader notices that the trainer is gone
                await _answer(writer, "SyncPause", error)
        elif self._pausing is None:  # given up meanwhile: the engine must be free again
            await self._resume_engine()

    async def _pause_engine(self, task: asyncio.Task[None] | None) -> None:
        assert self._attached
        drain = self._attached.mode == SyncMode.drain.value
        await self._engine.acquire()
        if self._pausing is task:
            # No await between these two: requests with the new salt must reach vLLM after the pause, and run with the new
            # weights; requests with the old salt must reach it before.
            self._new_salt()
            await self._engine.pause(drain=drain)

    async def _release(self, weight_version: int) -> str | None:
        assert self._attached
        self._attached = msgspec.structs.replace(self._attached, weight_version=weight_version)
        stale = await self._refresh()
        error = await self._resume()
        if self._expired:
            self._expired = False
            return "the lease ran out during the update, and the server was resumed before its end"
        return error or stale

    async def _resume(self) -> str | None:
        if self._pausing is None:
            return None
        # The task is not cancelled: vLLM's engine answers the call when it is idle, and the task must receive that answer.
        self._pausing = None
        return await self._resume_engine()

    async def _resume_engine(self) -> str | None:
        return await self._ask_engine(self._engine.resume(), "the server could not be resumed")

    def _new_salt(self) -> None:
        assert self._attached
        if self._attached.cache == CacheMode.salt.value:
            # The count is part of the salt: a step that was broken off has left weights that no version names.
            self._num_salts += 1
            self._engine.salt_requests(f"apollo-{self._attached.weight_version}-{self._num_salts}")

    async def _refresh(self) -> str | None:
        """Label what is sampled from now on with the weight version, and separate the prefix cache of older weights from
        that of requests to come."""
        assert self._attached
        self._new_salt()
        version = str(self._attached.weight_version)
        await self._ask_engine(self._engine.label_weights(version), "vLLM was not told the weight version")
        if self._attached.cache == CacheMode.reset.value:
            return await self._ask_engine(self._reset_cache(), "the prefix cache keeps entries of older weights")
        return None

    async def _reset_cache(self) -> None:
        # vLLM release 0.26: if requests run, drafted tokens of their streams are lost, and blocks that a KV connector has
        # still to send are kept. So the cache is emptied while nothing runs, in all releases.
        if self._pausing is not None:
            await self._engine.reset_prefix_cache()
            return
        await self._engine.acquire()
        try:
            await self._engine.pause(drain=False)
            await self._engine.reset_prefix_cache()
        finally:
            await self._engine.resume()

    async def _ask_engine(self, call: Awaitable[None], failure: str) -> str | None:
        """Await a call of vLLM's engine; returns ``failure`` with what it raised, which is also logged."""
        try:
            await call
        # vLLM raises failures of its engine as plain exceptions. The trainer is notified, and the API server goes on.
        except Exception as error:  # noqa: BLE001
            logger.error("apollo_tp: %s: %s", failure, error)
            return f"{failure}: {error}"
        return None


async def _read(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > lock_messages.MAX_SYNC_FRAME_BYTES:
        raise ValueError(f"got a frame of {size} bytes, expected at most {lock_messages.MAX_SYNC_FRAME_BYTES}")
    return await reader.readexactly(size)


async def _answer(writer: asyncio.StreamWriter, kind: str, error: str | None) -> None:
    """Send the answer to a request. Raises TimeoutError if the trainer does not read."""
    writer.write(lock_messages.frame(lock_messages.SyncAnswer(kind, error or "")))
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await writer.drain()
    except TimeoutError:
        raise TimeoutError(f"the trainer did not read the answer to {kind} for {WRITE_SECONDS:.0f} s") from None
