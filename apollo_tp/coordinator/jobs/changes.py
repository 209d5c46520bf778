"""Wakes requests that wait until something is stored."""

from __future__ import annotations

import asyncio


class Changes:
    """``version`` counts the changes. A change may concern one job: who follows another job is not woken by it."""

    def __init__(self) -> None:
        self.version = 0
        self._events: dict[str, asyncio.Event] = {}

    def notify(self, job_id: str = "") -> None:
        """Wake everyone who waits for any change, and those who wait for one of this job."""
        self.version += 1
        for key in {"", job_id}:
            if event := self._events.pop(key, None):
                event.set()

    def upcoming(self, job_id: str = "") -> asyncio.Event:
        """Set by the next change, of this job if one is named. Take it before looking: no change is missed then."""
        return self._events.setdefault(job_id, asyncio.Event())

    async def wait(self, seconds: float, event: asyncio.Event | None = None) -> bool:
        """Wait for ``event``, or any change. Returns False if there was none within ``seconds``."""
        event = event or self.upcoming()
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True
