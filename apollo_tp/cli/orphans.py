"""``apollo-tp end-orphans``: end the processes that a server left when another one of its processes was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import live_instances, read_instance, survivors
from apollo_tp.shards.manifest import ServerProcess

TERMINATE_SECONDS = 10.0
KILL_SECONDS = 10.0


def find(base: Path) -> dict[str, list[ServerProcess]]:
    """By instance id, the processes that live on although another one of their server has ended."""
    left = {name: survivors(read_instance(base / name)) for name in live_instances(base)[1]}
    return {name: alive for name, alive in left.items() if alive}


def end(base: Path, name: str, orphans: Sequence[ServerProcess]) -> list[ServerProcess]:
    """End the ``orphans`` of server ``name``: SIGTERM, then SIGKILL. Removes the server's folder once all have ended.
    Returns those that still live, such as one that waits for a driver."""
    left = _signal(orphans, signal.SIGTERM, TERMINATE_SECONDS)
    left = _signal(left, signal.SIGKILL, KILL_SECONDS)
    if not left:
        instance_folder.remove_instance(base / name)
    return left


def _signal(orphans: Sequence[ServerProcess], signum: int, seconds: float) -> list[ServerProcess]:
    """Send a signal to each process, unless another one has its pid by now; returns those that live after ``seconds``."""
    for orphan in orphans:
        try:
            descriptor = os.pidfd_open(orphan.pid)  # from here on the pid means this process, whatever happens to it
        except ProcessLookupError:
            continue
        try:
            if orphan.identity.alive():
                signal.pidfd_send_signal(descriptor, signum)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)
    deadline = time.monotonic() + seconds
    while (left := [orphan for orphan in orphans if orphan.identity.alive()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
