"""The ZMQ link to trainer rank 0: sends commands in order, each with a future for its reply, and detects lost heartbeats.

It is a ROUTER socket on a Unix socket of mode 0600 inside a folder of mode 0700. Messages that cannot be decoded are dropped
with a log line. The link stores nothing about jobs; the scheduler does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from apollo_tp.errors import DeadlineError, FrameError, RankFailedError
from apollo_tp.runtime.owned_folder import free_socket
from apollo_tp.wire import codec, commands

log = logging.getLogger(__name__)

MAX_REPLY_BYTES = 64 * 2**20
"""Larger frames are refused by ZMQ. A traceback, or the layout of a large model, is far smaller."""
Ask = Callable[[commands.AnyCommand], Awaitable[commands.AnyReply]]
"""Sends a command to the ranks and awaits its reply. Raises RanksGoneError, RankFailedError or DeadlineError."""


class RanksGoneError(DeadlineError):
    """Trainer rank 0 ended, or sent no heartbeat in time. Which commands it completed is unknown until its next Hello."""


def bind_private(socket: zmq.Socket[Any], path: Path) -> None:
    """Bind a ZMQ socket to the Unix socket ``path``, which only this user can open. Replaces an unused one."""
    free_socket(path)
    previous = os.umask(0o177)
    try:
        socket.bind(f"ipc://{path}")
    finally:
        os.umask(previous)


class RankLink:
    """The ROUTER socket for rank 0's DEALER socket, bound to ``path``.

    Rank 0 counts as lost after ``timeout_seconds`` without a heartbeat; sending has the same deadline. ``on_change`` is
    called when rank 0 connects or is lost. Call ``attach`` before ``run``.
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
        self._identify_sent: dict[bytes, tuple[str, float]] = {}  # by peer: id of the last Identify, and its time
        self._waiting: dict[str, asyncio.Future[commands.AnyReply]] = {}
        self._ready = asyncio.Event()
        self._ids = itertools.count(1)
        self.hello: commands.Hello | None = None
        self.weight_version: int | None = None
        self.replica_lag_seconds: list[float] = []
        self.last_received = 0.0
        self.progressed_at = 0.0  # when rank 0 last began or finished a command (monotonic)
        self.busy_with = ""
        self.gone_reason = "no trainer has connected yet"

    def attach(
        self,
        *,
        on_hello: Callable[[commands.Hello], None],
        on_orphan_reply: Callable[[commands.AnyReply], None],
        require_identify: Callable[[], bool],
    ) -> None:
        """Register the callbacks.

        ``on_hello`` runs when rank 0 has introduced itself, before ``ready`` returns. ``on_orphan_reply`` gets replies
        that nobody awaits: to commands of an earlier coordinator process, or later than their deadline. While
        ``require_identify()`` is true, a Hello is accepted only as the answer to an Identify command: rank 0 executes
        that after all earlier commands, so its answer names the last step.
        """
        self._on_hello, self._on_orphan_reply, self._require_identify = on_hello, on_orphan_reply, require_identify

    @property
    def connected(self) -> bool:
        """True from rank 0's Hello until it ends or sends no heartbeat in time."""
        return self._ready.is_set()

    async def ready(self) -> commands.Hello:
        """Wait, without a deadline, until rank 0 is connected. Returns its Hello."""
        await self._ready.wait()
        assert self.hello is not None
        return self.hello

    def new_id(self, what: str) -> str:
        """A unique id, beginning with ``what/``, for a command that is not a step of a job."""
        return f"{what}/{os.getpid()}.{next(self._ids)}"

    async def send(self, command: commands.AnyCommand) -> asyncio.Future[commands.AnyReply]:
        """Send a command and return a future for its reply.

        The future fails with RankFailedError if a rank raised, and with RanksGoneError if rank 0 is lost before it replied.
        Raises RanksGoneError if the command cannot be sent.
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
        """Stop waiting for this reply: if it still comes, it goes to ``on_orphan_reply``."""
        self._waiting = {identity: waiting for identity, waiting in self._waiting.items() if waiting is not future}

    async def run(self) -> None:
        """Receive and dispatch messages until cancelled; then close the socket."""
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
            # a rank 0 from before our restart, or one that was counted as lost: count what it finished, then identify it
            if peer == self._peer or self._peer is None:
                self._on_orphan_reply(reply)
            await self._identify(peer)
        else:
            self.last_received = time.monotonic()
            self._dispatch(reply)

    def _dispatch(self, reply: commands.AnyReply) -> None:
        if not isinstance(reply, commands.Heartbeat) or reply.busy_with != self.busy_with:
            self.progressed_at = time.monotonic()
        if isinstance(reply, commands.Heartbeat):
            self.weight_version, self.busy_with = reply.weight_version, reply.busy_with
            return
        if isinstance(reply, commands.Goodbye):
            self._lost(f"the trainer ended: {reply.reason}")
            return
        if isinstance(reply, commands.StepDone):
            self.weight_version, self.replica_lag_seconds = reply.figures.weight_version, reply.replica_lag_seconds
        elif isinstance(reply, commands.RestoreDone):  # a checkpoint's may be older: training went on
            self.weight_version = reply.weight_version
        future = self._waiting.pop(reply.id, None)
        if future is None:
            self._on_orphan_reply(reply)
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
        sent = self._identify_sent.get(peer)
        answers_last = sent is not None and hello.id == sent[0]
        if hello.id and not answers_last:
            return  # it answers an earlier Identify that it received while busy, so it may be older than our commands
        if self._require_identify() and not answers_last:
            await self._identify(peer)
            return
        self._identify_sent.pop(peer, None)
        if self._peer not in (None, peer) and self.connected:
            self._lost("another trainer took over")
        self._fail_waiting("the trainer started again")
        self._peer, self.hello, self.weight_version = peer, hello, hello.weight_version
        self.last_received = time.monotonic()
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
        sent = self._identify_sent
        if peer in sent and now - sent[peer][1] < self._timeout:
            return
        identity = self.new_id("identify")
        recent = {key: value for key, value in sent.items() if now - value[1] < 10 * self._timeout}
        self._identify_sent = recent | {peer: (identity, now)}
        with contextlib.suppress(zmq.ZMQError):  # the peer may have ended meanwhile
            command = codec.encode(commands.Identify(id=identity))
            await self._socket.send_multipart([peer, command], flags=zmq.NOBLOCK)

    async def _watch(self) -> None:
        interval = min(1.0, self._timeout / 4)
        while True:
            before = time.monotonic()
            await asyncio.sleep(interval)
            now = time.monotonic()
            if now - before > 2 * interval:
                continue  # this loop was busy: first it reads what has arrived meanwhile
            silent = now - self.last_received
            if self.connected and silent > self._timeout:
                self._lost(f"no heartbeat of rank 0 for {silent:.1f} s, expected one per second")

    def _lost(self, reason: str) -> None:
        log.error("lost the trainer: %s", reason)
        self.gone_reason = reason
        self._ready.clear()
        self._identify_sent.clear()
        self._fail_waiting(reason)
        self._on_change()

    def _fail_waiting(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(RanksGoneError(reason))


def _retrieve(future: asyncio.Future[commands.AnyReply]) -> None:
    """Mark the exception as retrieved: nobody awaits the command sent ahead if an earlier one fails."""
    if not future.cancelled():
        future.exception()
