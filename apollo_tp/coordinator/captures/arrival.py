"""What is known when a completion or feedback arrives: which weights were served then, and how much a client has sent."""

from __future__ import annotations

import bisect
import collections
import time

from apollo_tp.errors import refuse

MINUTE = 60.0
MAX_VERSIONS = 4096


class Versions:
    """Weight versions and since when each is served, in seconds since the epoch."""

    def __init__(self) -> None:
        self._since: collections.deque[float] = collections.deque(maxlen=MAX_VERSIONS)
        self._versions: collections.deque[int] = collections.deque(maxlen=MAX_VERSIONS)

    def add(self, version: int) -> None:
        """This version is served from now on."""
        self._since.append(time.time())
        self._versions.append(version)

    def at(self, when: float, now: int | None) -> int | None:
        """The version at the time ``when``; ``now`` is the current one, where no step has been made since the start."""
        position = bisect.bisect_right(self._since, when)
        if position:
            return self._versions[position - 1]
        return self._versions[0] - 1 if self._versions else now


class Votes:
    """How much feedback each client has given in the last minute."""

    def __init__(self, per_minute: int) -> None:
        self._limit = per_minute
        self._times: dict[str, collections.deque[float]] = {}

    def count(self, client: str) -> None:
        """Raise RequestError 429 beyond the limit."""
        now = time.monotonic()
        times = self._times.setdefault(client, collections.deque())
        while times and now - times[0] > MINUTE:
            times.popleft()
        if len(times) >= self._limit:
            raise refuse("feedback", f"{len(times)} in a minute from this client", f"at most {self._limit}; try again later",
                         status=429, code="too_much_feedback")  # fmt: skip
        times.append(now)
        self._times = {name: when for name, when in self._times.items() if now - when[-1] <= MINUTE}
