"""The ZMQ link to trainer rank 0: commands go out in order, each with a future for its reply; silence is noticed.

A ROUTER on a 0600 unix socket inside a 0700 folder. What cannot be decoded, or comes from a peer that did not introduce
itself, is dropped with a log line. The link keeps nothing of a job: the scheduler does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from apollo_tp.errors import DeadlineError, FrameError, RankFailedError
from apollo_tp.runtime.owned_folder import free_socket
from apollo_tp.wire import codec, commands

log = logging.getLogger(__name__)

# a rank's traceback and the layout rows of a large model fit many times over; a hostile frame does not
MAX_REPLY_BYTES = 64 * 2**20


class RanksGoneError(DeadlineError):
    """Trainer rank 0 left, or was silent for too long. What it was doing is unknown until it says Hello again."""


def bind_private(socket: zmq.Socket[Any], path: Path) -> None:
    """Bind a ZMQ socket to a unix socket that only this user can open."""
    free_socket(path)
    previous = os.umask(0o177)
    try:
        socket.bind(f"ipc://{path}")
    finally:
        os.umask(previous)


class RankLink:
    """One ROUTER for rank 0's DEALER.

    Call ``attach`` before ``run``.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        path: Path,
        *,
        timeout_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 16)
        bind_private(self._socket, path)
        self._timeout = timeout_seconds
        self._on_change = on_change
        self._peer: bytes | None = None
        self._asked: dict[bytes, tuple[str, float]] = {}  # peers sent an Identify: its id and when
        self._waiting: dict[str, asyncio.Future[commands.AnyReply]] = {}
        self._ready = asyncio.Event()
        self._ids = itertools.count(1)
        self.hello: commands.Hello | None = None
        self.weight_version: int | None = None
        self.last_heard = 0.0
        self.moved_at = 0.0  # when it last began or finished something
        self.busy_with = ""
        self.gone_reason = "no trainer has connected yet"

    def attach(
        self,
        *,
        on_hello: Callable[[commands.Hello], None],
        on_stray: Callable[[commands.AnyReply], None],
        needs_barrier: Callable[[], bool],
    ) -> None:
        """Who is told: ``on_hello`` when rank 0 introduced itself, before anybody waiting in ``ready`` goes on;
        ``on_stray`` of replies to commands of a former life; ``needs_barrier`` says whether only a Hello that answers
        an Identify counts.
        """
        self._on_hello, self._on_stray, self._needs_barrier = on_hello, on_stray, needs_barrier

    @property
    def connected(self) -> bool:
        """True while rank 0 is known and was heard from in time."""
        return self._ready.is_set()

    async def ready(self) -> commands.Hello:
        """Wait until rank 0 is there."""
        await self._ready.wait()
        assert self.hello is not None
        return self.hello

    def new_id(self, what: str) -> str:
        """An id for a command that is not a step of a job."""
        return f"{what}/{os.getpid()}.{next(self._ids)}"

    async def send(self, command: commands.AnyCommand) -> asyncio.Future[commands.AnyReply]:
        """Send a command; the future is its reply.

        It fails with RankFailedError if a rank raised, with RanksGoneError if rank 0 leaves or falls silent first.
        """
        if self._peer is None or not self.connected:
            raise RanksGoneError(self.gone_reason)
        future: asyncio.Future[commands.AnyReply] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_retrieve)
        self._waiting[command.id] = future
        try:
            async with asyncio.timeout(self._timeout):
                await self._socket.send_multipart([self._peer, codec.encode(command)])
        except (zmq.ZMQError, TimeoutError) as error:
            self._waiting.pop(command.id, None)
            self._lost(f"rank 0 cannot be reached: {error or 'its queue is full'}")
            raise RanksGoneError(self.gone_reason) from error
        return future

    def abandon(self, future: asyncio.Future[commands.AnyReply]) -> None:
        """Nobody waits for this reply any more: if it comes, it is a stray one."""
        self._waiting = {identity: waiting for identity, waiting in self._waiting.items() if waiting is not future}

    async def run(self) -> None:
        """Receive until cancelled."""
        watcher = asyncio.create_task(self._watch())
        try:
            while True:
                frames = await self._socket.recv_multipart()
                if len(frames) != 2:
                    log.warning("dropped a message of %d frames on the ranks' socket, expected 2", len(frames))
                    continue
                try:
                    reply = codec.decode(frames[1], commands.AnyReply)
                except FrameError as error:
                    log.warning("dropped %d bytes on the ranks' socket: %s", len(frames[1]), error)
                    continue
                await self._received(frames[0], reply)
        finally:
            watcher.cancel()
            self._socket.close(0)

    async def _received(self, peer: bytes, reply: commands.AnyReply) -> None:
        if isinstance(reply, commands.Hello):
            await self._hello(peer, reply)
        elif peer != self._peer or not self.connected:
            # rank 0 from before our restart, or one that we gave up: what it finished counts, and it is asked who it is
            if peer == self._peer or self._peer is None:
                self._on_stray(reply)
            await self._identify(peer)
        else:
            self.last_heard = time.monotonic()
            self._dispatch(reply)

    def _dispatch(self, reply: commands.AnyReply) -> None:
        if not isinstance(reply, commands.Heartbeat) or reply.busy_with != self.busy_with:
            self.moved_at = time.monotonic()
        if isinstance(reply, commands.Heartbeat):
            self.weight_version, self.busy_with = reply.weight_version, reply.busy_with
            return
        if isinstance(reply, commands.Goodbye):
            self._lost(f"the trainer ended: {reply.reason}")
            return
        if isinstance(reply, commands.StepDone):
            self.weight_version = reply.figures.weight_version
        elif isinstance(reply, commands.CheckpointDone):
            self.weight_version = reply.weight_version
        future = self._waiting.pop(reply.id, None)
        if future is None:
            self._on_stray(reply)
        elif future.done():
            pass
        elif isinstance(reply, commands.CommandFailed):
            message = f"rank {reply.rank} raised {reply.error}: {reply.message}"
            future.set_exception(RankFailedError(message, rank=reply.rank, traceback=reply.traceback))
        else:
            future.set_result(reply)

    async def _hello(self, peer: bytes, hello: commands.Hello) -> None:
        if hello.protocol_version != commands.PROTOCOL_VERSION:
            log.error(
                "refused rank 0: got protocol version %d, expected %d",
                hello.protocol_version,
                commands.PROTOCOL_VERSION,
            )
            return
        asked = self._asked.get(peer)
        if hello.id and (asked is None or hello.id != asked[0]):
            return  # asked again and again while it was busy, it answers each time: this one is older than our commands
        if self._needs_barrier() and (asked is None or hello.id != asked[0]):
            # a job was interrupted: only a Hello that is in order with the commands says how far it came
            await self._identify(peer)
            return
        self._asked.pop(peer, None)
        if self._peer not in (None, peer) and self.connected:
            self._lost("another trainer took over")
        self._fail_waiting("the trainer started again")
        self._peer, self.hello, self.weight_version = peer, hello, hello.weight_version
        self.last_heard = time.monotonic()
        self._on_hello(hello)
        log.info(
            "trainer connected: %d ranks, %s, weight version %d",
            hello.num_ranks,
            hello.model_path,
            hello.weight_version,
        )
        self._ready.set()
        self._on_change()

    async def _identify(self, peer: bytes) -> None:
        now = time.monotonic()
        if peer in self._asked and now - self._asked[peer][1] < self._timeout:
            return
        self._asked = {key: value for key, value in self._asked.items() if now - value[1] < 10 * self._timeout}
        self._asked[peer] = (self.new_id("identify"), now)
        with contextlib.suppress(zmq.ZMQError):  # the peer may be gone again
            command = codec.encode(commands.Identify(id=self._asked[peer][0]))
            await self._socket.send_multipart([peer, command], flags=zmq.NOBLOCK)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            silent = time.monotonic() - self.last_heard
            if self.connected and silent > self._timeout:
                self._lost(f"no heartbeat of rank 0 for {silent:.1f} s, expected one per second")

    def _lost(self, reason: str) -> None:
        log.error("lost the trainer: %s", reason)
        self.gone_reason = reason
        self._ready.clear()
        self._asked.clear()
        self._fail_waiting(reason)
        self._on_change()

    def _fail_waiting(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(RanksGoneError(reason))


def _retrieve(future: asyncio.Future[commands.AnyReply]) -> None:
    """Mark the exception as seen: a command that was sent ahead may lose its reader when an earlier one fails."""
    if not future.cancelled():
        future.exception()
