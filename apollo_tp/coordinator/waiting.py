"""The coordinator before its server is ready: its port, its page and ``/train/status`` say what is waited for.

Trainer rank 0 writes orders to this process's standard input, one JSON object per line: ``WaitHere`` first, then a
``WaitingFor`` whenever that changes, and ``Begin`` once the server is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.http import page
from apollo_tp.coordinator.http.auth import load_access
from apollo_tp.coordinator.http.connections import BoundedServer
from apollo_tp.coordinator.http.middleware import ServiceMiddleware
from apollo_tp.coordinator.settings import WAITING_FILE, Begin, Order, WaitHere, WaitingFor
from apollo_tp.runtime import private_files

log = logging.getLogger("apollo_tp.coordinator")

STOP_SECONDS = 5.0
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Waiting:
    """What is waited for, and the answers that say so."""

    def __init__(self) -> None:
        self.reason = "the trainer starts"

    async def status(self, request: Request) -> Response:
        """``GET /train/status`` in its usual form. Jobs are in the database, which is read once the server is ready."""
        return JSONResponse({
            "object": "train.status", "time": time.time(),
            "trainer": {"connected": False, "weight_version": None, "reason": self.reason},
            "running": None, "queue": [], "counts": {}, "last_losses": [], "last_checkpoint": None, "unsaved": False,
        })  # fmt: skip

    async def page(self, request: Request) -> Response:
        """The page, which shows the status."""
        return await page.page()

    async def refuse(self, request: Request) -> Response:
        """The answer to everything else: 503, to be tried again."""
        message = f"not yet: {self.reason}; try again"
        details = {"message": message, "type": "server_error", "param": None, "code": "no_server"}
        return JSONResponse({"error": details}, status_code=503, headers={"Retry-After": "5"})


async def first_order() -> tuple[WaitHere, AsyncIterator[Order]]:
    """The first line on standard input, and the orders after it."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    orders = _orders(reader)
    first = await anext(orders)
    assert isinstance(first, WaitHere)
    return first, orders


async def _orders(reader: asyncio.StreamReader) -> AsyncIterator[Order]:
    while line := await reader.readline():
        yield msgspec.json.decode(line, type=Order)


async def serve_until_ready(
    service: ServiceConfig, base: Path, listener: socket.socket, orders: AsyncIterator[Order]
) -> Path | None:
    """Answer on ``listener`` until the order to begin; returns the path of the settings, or None if the trainer has ended.
    ``listener`` stays open: clients that connect meanwhile are answered by what follows."""
    waiting = Waiting()
    server = BoundedServer(_app(waiting, service), graceful_seconds=1)
    answering = asyncio.create_task(server.serve(sockets=[listener.dup()]))
    following = asyncio.create_task(_follow(orders, waiting))
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, following.cancel)
    try:
        with _published(base, listener), contextlib.suppress(asyncio.CancelledError):
            return await following
        return None
    finally:
        server.should_exit = True
        await asyncio.wait({answering}, timeout=STOP_SECONDS)


async def _follow(orders: AsyncIterator[Order], waiting: Waiting) -> Path | None:
    """Carry out orders up to ``Begin``."""
    async for order in orders:
        match order:
            case WaitingFor():
                waiting.reason = order.reason
            case Begin():
                return Path(order.config)
    log.debug("the trainer is gone")
    return None


def _app(waiting: Waiting, service: ServiceConfig) -> ServiceMiddleware:
    routes = [
        Route("/train/status", waiting.status, methods=["GET"]),
        Route("/", waiting.page, methods=["GET"]),
        Mount(page.PREFIX, page.files()),
        Route("/{rest:path}", waiting.refuse, methods=METHODS),
    ]
    return ServiceMiddleware(Starlette(routes=routes), load_access(service), service, lambda: None)


@contextlib.contextmanager
def _published(base: Path, listener: socket.socket) -> Iterator[None]:
    """Write the address to a file for the command line while nothing else says where a coordinator is."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    path = base / WAITING_FILE
    private_files.write_private(path, json.dumps({"url": url, "pid": os.getpid()}).encode())
    log.info("coordinator at %s, which waits for the server", url)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
