"""How fast the running job is."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Speed of the running job. ``recent`` has, for its last steps, the time each ended (monotonic) and its tokens."""

    job_id: str = ""
    recent: collections.deque[tuple[float, int]] = field(default_factory=lambda: collections.deque(maxlen=32))

    def tokens_per_second(self) -> float | None:
        """Mean over the recent steps but the first, whose start is unknown; None until two have ended."""
        if len(self.recent) < 2:
            return None
        seconds = self.recent[-1][0] - self.recent[0][0]
        return sum(tokens for _, tokens in list(self.recent)[1:]) / max(seconds, 1e-9)

    def seconds_left(self, steps: int) -> float | None:
        """Estimated seconds for ``steps`` further steps; None until two have ended."""
        if len(self.recent) < 2:
            return None
        return steps * (self.recent[-1][0] - self.recent[0][0]) / (len(self.recent) - 1)
