"""For how long the interpreter's lock keeps other threads from running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def longest_stall(work: Callable[[], object]) -> tuple[float, float]:
    """Run ``work`` on a thread. The longest time for which this thread did not run meanwhile, and how long ``work`` took, in
    seconds."""
    thread = threading.Thread(target=work)
    start = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest, time.perf_counter() - start
