"""Work for a request that takes long: bounded, on threads of its own, and cancelled when the client goes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from apollo_tp.errors import ApolloTpError, refuse

T = TypeVar("T")
IsAbandoned = Callable[[], bool]
_UNINTERRUPTED: set[asyncio.Task[Any]] = set()


class ClientGoneError(ApolloTpError):
    """The client closed its connection; nobody receives the answer."""


class Workers:
    """``num_threads`` threads for ``what``. More than ``limit`` requests at once, waiting ones too, are answered 429."""

    def __init__(self, what: str, num_threads: int, limit: int) -> None:
        self._what, self._limit, self._admitted = what, limit, 0
        self._pool = ThreadPoolExecutor(num_threads, what)

    async def run(self, request: Request, function: Callable[[IsAbandoned], T]) -> T:
        """The value of ``function``, whose argument tells it when to stop. Read the request's body before.

        Raises RequestError 429 and, once the client has gone, ClientGoneError.
        """
        if self._admitted >= self._limit:
            expected = f"at most {self._limit}; try again later"
            raise refuse(self._what, f"{self._admitted} requests at once", expected, status=429, code="busy")
        stop = threading.Event()
        self._admitted += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, stop.is_set)
        future.add_done_callback(self._ended)
        try:
            return await while_connected(request, asyncio.shield(future))
        finally:
            stop.set()
            future.cancel()  # has an effect if it still waits for a thread

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self._admitted -= 1
        if not future.cancelled():
            future.exception()  # retrieved: the client may be gone


async def while_connected(request: Request, work: asyncio.Future[T] | Coroutine[Any, Any, T]) -> T:
    """The value of ``work``; cancels it and raises ClientGoneError if the client closes its connection before."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("the client closed its connection before the answer was complete")
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The value of ``work``, which goes on if the request is cancelled: what is stored must also be begun."""
    task = asyncio.create_task(work)
    _UNINTERRUPTED.add(task)
    task.add_done_callback(_UNINTERRUPTED.discard)
    return await asyncio.shield(task)
