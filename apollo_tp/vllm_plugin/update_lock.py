"""The server's end of the update lock: pauses vLLM while trainer rank 0 writes, and refreshes the prefix cache afterwards.

One trainer connection at a time, over a 0600 unix socket in the instance's private folder. The lock is a lease: when the
connection ends, or nothing is heard for ``lease_seconds``, the server is resumed from here, whatever became of the trainer.
A pause that somebody else asked for (vLLM's /pause) is left to them; what they ask for during ours comes after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
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


class PausableEngine(Protocol):
    """The part of vLLM's engine that is used; compat.Engine."""

    async def hold(self) -> None: ...
    async def pause(self, *, drain: bool) -> None: ...
    async def resume(self) -> None: ...
    async def reset_prefix_cache(self) -> None: ...
    def salt_requests(self, salt: str) -> None: ...


class UpdateLock:
    """Listens from ``start`` on. ``refusal`` says why this server cannot be paused ("" when it can)."""

    def __init__(
        self, engine: PausableEngine, refusal: str = "", lease_seconds: float = lock_messages.SYNC_LEASE_SECONDS
    ) -> None:
        self._engine, self._refusal, self._lease_seconds = engine, refusal, lease_seconds
        self._attached: lock_messages.SyncAttach | None = None
        self._pausing: asyncio.Task[None] | None = None
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
        mine = False
        try:
            error = self._attach(await self._request(reader))
            mine = not error
            if mine:
                error = await self._refresh()
            await _answer(writer, "SyncAttach", error)
            while mine:
                await self._handle(await self._request(reader), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the trainer left
        except TimeoutError:
            writer.transport.abort()  # it takes no answer: close would wait until it does
        except (FrameError, ValueError) as error:
            logger.warning("apollo_tp: the update lock's connection is closed: %s", error)
        finally:
            writer.close()
            if mine:
                await self._detach()

    def _attach(self, request: lock_messages.SyncRequest) -> str:
        """Take the place of the one trainer; returns why not."""
        if not isinstance(request, lock_messages.SyncAttach):
            raise ValueError(f"got {type(request).__name__}, expected SyncAttach first")
        SyncMode(request.mode), CacheMode(request.cache)
        if self._refusal:
            return self._refusal
        if self._attached is not None:
            return "got a second trainer, expected one; stop the other one"
        self._attached = request
        self._engine.salt_requests("")  # of a trainer before this one
        return ""

    async def _detach(self) -> None:
        """The trainer is gone, perhaps in the middle of a write: resume, and keep its half step out of the cache."""
        held = self._pausing is not None
        try:
            await self._resume()
            await self._refresh()
        except Exception as error:  # noqa: BLE001 - vLLM's engine ended: there is nothing left to resume
            logger.error("apollo_tp: the server could not be resumed: %s", error)
            return
        finally:
            self._attached = None
        logger.log(
            logging.WARNING if held else logging.INFO,
            "apollo_tp: the trainer left%s", " while the server was paused; resumed" if held else "",
        )  # fmt: skip

    async def _request(self, reader: asyncio.StreamReader) -> lock_messages.SyncRequest:
        """The next request. While a pause is held it must come within the lease: otherwise the server is resumed."""
        frame = asyncio.ensure_future(_read(reader))
        try:
            if self._pausing is not None:
                done, _ = await asyncio.wait({frame}, timeout=self._lease_seconds)
                if not done:
                    logger.error(
                        "apollo_tp: nothing heard of the trainer for %.0f s while it held the server paused, expected a "
                        "word every %.1f s; resumed", self._lease_seconds, lock_messages.SYNC_RENEW_SECONDS,
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

    async def _pause(self, writer: asyncio.StreamWriter) -> None:
        assert self._attached
        task, error, drain = asyncio.current_task(), "", self._attached.mode == SyncMode.drain.value
        try:
            await self._engine.hold()
            if self._pausing is task:
                # No await between these two: what has the new salt must reach vLLM behind the pause, and run with the
                # new weights; what has the old one must reach it before.
                self._new_salt()
                await self._engine.pause(drain=drain)
        # vLLM hands engine failures on as plain exceptions; the trainer must hear of them, the server goes on.
        except Exception as caught:  # noqa: BLE001
            error = f"vLLM did not pause: {caught}"
        if self._pausing is task:
            with contextlib.suppress(ConnectionError, TimeoutError):  # the reader notices that the trainer is gone
                await _answer(writer, "SyncPause", error)
        elif self._pausing is None:  # given up meanwhile: hold nothing
            await self._engine.resume()

    async def _release(self, weight_version: int) -> str:
        assert self._attached
        self._attached = msgspec.structs.replace(self._attached, weight_version=weight_version)
        error = await self._refresh()
        await self._resume()
        if self._expired:
            self._expired = False
            return "the lease ran out during the update, and the server was resumed before its end"
        return error

    async def _resume(self) -> None:
        if self._pausing is None:
            return
        # not cancelled: vLLM's engine answers the call when it is idle, and somebody must take that answer
        self._pausing = None
        await self._engine.resume()

    def _new_salt(self) -> None:
        assert self._attached
        if self._attached.cache == CacheMode.salt.value:
            # the count: a step that was broken off has left weights that no version names
            self._num_salts += 1
            self._engine.salt_requests(f"apollo-{self._attached.weight_version}-{self._num_salts}")

    async def _refresh(self) -> str:
        """Part the prefix cache of older weights from what comes; returns what went wrong."""
        assert self._attached
        self._new_salt()
        if self._attached.cache == CacheMode.reset.value:
            try:
                await self._reset_cache()
            except Exception as error:  # noqa: BLE001 - as in _pause
                logger.error("apollo_tp: the prefix cache keeps entries of older weights: %s", error)
                return f"the prefix cache keeps entries of older weights: {error}"
        return ""

    async def _reset_cache(self) -> None:
        """While nothing runs: of requests that run, some releases lose tokens that were drafted, and keep blocks that a KV
        connector still has to send."""
        if self._pausing is not None:
            await self._engine.reset_prefix_cache()
            return
        await self._engine.hold()
        try:
            await self._engine.pause(drain=False)
            await self._engine.reset_prefix_cache()
        finally:
            await self._engine.resume()


async def _read(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > lock_messages.MAX_SYNC_FRAME_BYTES:
        raise ValueError(f"got a frame of {size} bytes, expected at most {lock_messages.MAX_SYNC_FRAME_BYTES}")
    return await reader.readexactly(size)


async def _answer(writer: asyncio.StreamWriter, kind: str, error: str) -> None:
    writer.write(lock_messages.frame(lock_messages.SyncAnswer(kind, error)))
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.drain()
