"""What training costs the server's clients: latency from the server's own metrics, now and over time."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Iterable

import msgspec
from prometheus_client.parser import text_string_to_metric_families

# vLLM's names, newer ones first; sums and counts over the server's life
_LATENCIES = {
    "inter_token_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "first_token_seconds": ("vllm:time_to_first_token_seconds",),
}
_RUNNING = "vllm:num_requests_running"
_NAMES = (_RUNNING, *(name for names in _LATENCIES.values() for name in names))
INTERVAL_SECONDS, IDLE_INTERVAL_SECONDS = 2.0, 5.0
"""Between two looks at the server's metrics while a job runs, and while none does."""
MAX_POINTS = 2048


class Mean(msgspec.Struct, frozen=True):
    """Seconds and how many tokens or requests they were of."""

    sum: float = 0.0
    count: float = 0.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    def since(self, before: Mean) -> Mean:
        """What was added to ``before``; all of it if the server was started again meanwhile."""
        return self if self.count < before.count else Mean(self.sum - before.sum, self.count - before.count)


class Point(msgspec.Struct, frozen=True):
    """Latency in the interval that ended at ``time`` (Unix seconds). ``training``: a job ran; None for a part of it."""

    time: float
    training: bool | None
    requests_running: float | None
    inter_token_seconds: Mean = Mean()
    first_token_seconds: Mean = Mean()


class Figures(msgspec.Struct, frozen=True):
    """The server's own figures: means over its life. One that it does not have is None."""

    requests_running: float | None
    inter_token_seconds: Mean | None = None
    first_token_seconds: Mean | None = None


class LatencyHistory:
    """Latency of the server at ``url`` over time, in at most MAX_POINTS points: once there are more, the older half becomes
    half as fine."""

    def __init__(self, url: str | None, is_training: Callable[[], bool]) -> None:
        self.url, self._is_training = url, is_training
        self.points: list[Point] = []
        self.reason = "no look at the server's metrics yet" if url else "service.server_url is not set"
        self._before: tuple[Figures, bool] | None = None

    @property
    def last(self) -> Figures | None:
        """What the server said at the last look; None if that was not possible."""
        return self._before[0] if self._before else None

    async def run(self) -> None:
        """Look at the server's metrics now and then."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_SECONDS if self._is_training() else IDLE_INTERVAL_SECONDS)

    async def look(self) -> None:
        """Add the interval since the last look. ``reason`` is why that was not possible, or ""."""
        try:
            figures = await server_figures(self.url)
        except (OSError, TimeoutError, ValueError) as error:
            self.reason, self._before = f"{type(error).__name__}: {error}", None
            return
        self.reason = ""
        self.add(time.time(), figures, self._is_training())

    def add(self, now: float, figures: Figures, training: bool) -> None:
        """Add what the server's figures say of the interval since the ones that were added last."""
        if self._before is not None:
            before, trained = self._before
            means = [
                Mean() if new is None else new.since(old or Mean())
                for new, old in (
                    (figures.inter_token_seconds, before.inter_token_seconds),
                    (figures.first_token_seconds, before.first_token_seconds),
                )
            ]
            self.points.append(Point(now, training if training == trained else None, figures.requests_running, *means))
        self._before = figures, training
        if len(self.points) > MAX_POINTS:
            half = MAX_POINTS // 2
            pairs = zip(self.points[:half:2], self.points[1:half:2], strict=True)
            self.points[:half] = [_joined(first, second) for first, second in pairs]

    def means(self, training: bool) -> dict[str, Mean]:
        """Means over the whole history, with or without training."""
        chosen = [point for point in self.points if point.training is training]
        return {name: _total(getattr(point, name) for point in chosen) for name in _LATENCIES}


def _joined(first: Point, second: Point) -> Point:
    return Point(
        second.time,
        first.training if first.training is second.training else None,
        second.requests_running,
        first.inter_token_seconds + second.inter_token_seconds,
        first.first_token_seconds + second.first_token_seconds,
    )


def _total(means: Iterable[Mean]) -> Mean:
    return sum(means, start=Mean())


async def server_figures(url: str | None) -> Figures:
    """The figures of the server at ``url``. Raises OSError, TimeoutError or ValueError."""
    import httpx  # costs a tenth of a second of start-up, and most coordinators never need it

    async with asyncio.timeout(3.0), httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        try:
            answer = await client.get(f"{(url or '').rstrip('/')}/metrics")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(str(error) or type(error).__name__) from error
    return await asyncio.to_thread(parse_server_metrics, answer.text)


def parse_server_metrics(text: str) -> Figures:
    """Sums, counts and running requests from Prometheus text, summed over labels. Raises ValueError for other text."""
    totals: dict[str, float] = collections.defaultdict(float)
    # a server has some thousand lines; what is not needed is not parsed
    needed = "\n".join(line for line in text.splitlines() if not line.startswith(("vllm:", "# ")) or _is_needed(line))
    for family in text_string_to_metric_families(needed + "\n"):
        for sample in family.samples:
            totals[sample.name] += sample.value
    found: dict[str, Mean] = {}
    for key, names in _LATENCIES.items():
        for name in names:
            if f"{name}_count" in totals:
                found[key] = Mean(totals[f"{name}_sum"], totals[f"{name}_count"])
                break
    return Figures(totals.get(_RUNNING), **found)


def _is_needed(line: str) -> bool:
    return "_bucket{" not in line and any(name in line for name in _NAMES)
