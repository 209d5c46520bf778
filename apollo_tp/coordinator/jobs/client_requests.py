"""What clients ask of the ranks (scores), in one queue beside the running job's commands, which it must not hold up."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable, Iterator

from apollo_tp.coordinator.jobs.rank_link import Ask
from apollo_tp.errors import DeadlineError, refuse
from apollo_tp.wire import commands

MAX_REQUESTS = 32
"""Further requests are answered 429."""


class ClientRequests:
    """At most one command of clients is at the ranks at a time, so that rank 0's queue stays short: it sends heartbeats, and
    begins the job's next step, as soon as what it was sent before is done. While a job runs, one is sent for each command
    of the job that ends.

    ``ask`` sends a command and awaits its reply; ``is_training`` says whether a job runs. A command waits for at most
    ``timeout_seconds`` until it is sent.
    """

    def __init__(self, ask: Ask, is_training: Callable[[], bool], timeout_seconds: float) -> None:
        self._ask, self._is_training, self._timeout = ask, is_training, timeout_seconds
        self._admitted = 0
        self._turns: collections.deque[asyncio.Future[None]] = collections.deque()
        self._turn: asyncio.Future[None] | None = None
        """Of the request whose command is at the ranks."""
        self._may_send = True

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Within the context, a request may ask. Raises RequestError 429 if too many do."""
        if self._admitted >= MAX_REQUESTS:
            expected = f"at most {MAX_REQUESTS}; try again later"
            raise refuse(
                "requests", f"{self._admitted} that wait for the ranks", expected, status=429, code="ranks_busy"
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def ask(self, command: commands.AnyCommand) -> commands.AnyReply:
        """Send a command when its turn has come, and await its reply. If the caller is cancelled before that, it is not
        sent. Raises RanksGoneError, RankFailedError, DeadlineError."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        self._next()
        try:
            async with asyncio.timeout(self._timeout):
                await turn
        except TimeoutError:
            self._pass_on(turn)
            message = f"the ranks had no time for this request within {self._timeout:.0f} s; try again later"
            raise DeadlineError(message) from None
        except asyncio.CancelledError:
            self._pass_on(turn)
            raise
        # the turn lasts until the reply has come, also if the caller is cancelled
        task = asyncio.ensure_future(self._ask(command))
        task.add_done_callback(lambda _: self._ended(task))
        return await asyncio.shield(task)

    def job_advanced(self) -> None:
        """A command of the running job has ended, or the job has: the next request may be sent."""
        self._may_send = True
        self._next()

    def _pass_on(self, turn: asyncio.Future[None]) -> None:
        if turn is self._turn:
            self._turn, self._may_send = None, True
        else:
            self._turns.remove(turn)
        self._next()

    def _ended(self, task: asyncio.Future[commands.AnyReply]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved: the caller may be gone
        self._turn = None
        self._next()

    def _next(self) -> None:
        if self._turn is None and self._turns and (self._may_send or not self._is_training()):
            self._may_send = False
            self._turn = self._turns.popleft()
            if not self._turn.done():  # a caller that was cancelled at this moment passes it on
                self._turn.set_result(None)
