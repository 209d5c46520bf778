"""Time per phase of a step."""

from __future__ import annotations

import time

import torch


class Clock:
    """Time per phase of a step: on CUDA measured by the device, since the host is phases ahead, elsewhere by the host.
    A phase ends at its mark and begins at the mark before it; the first one begins when the clock is made."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self._device, self._start = device, time.perf_counter()
        self._last = self._now()
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def mark(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def total(self) -> float:
        """Wait for the current stream; returns the host's seconds since the clock was made, and fills ``seconds``."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        total = time.perf_counter() - self._start
        for phase, now in self._marks:
            self.seconds[phase] += _elapsed(self._last, now)
            self._last = now
        self._marks = []
        return total

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        assert isinstance(stop, float)
        return stop - start
    return start.elapsed_time(stop) / 1e3  # type: ignore[no-any-return]
