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

    async def wait(self, seconds: float, job_id: str = "") -> bool:
        """Wait for the next change, of this job if one is named. Returns False if there was none within ``seconds``."""
        event = self._events.setdefault(job_id, asyncio.Event())
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True
