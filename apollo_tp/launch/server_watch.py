"""Notice the end of the server, also while this rank is busy."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from apollo_tp.errors import ServerGoneError
from apollo_tp.shards.instance import end_survivors_advice, processes_of, survivors
from apollo_tp.shards.manifest import Manifest

POLL_SECONDS = 0.5


class ServerWatch:
    """A thread per rank that notices at once that a process of the server has ended: a worker, whose memory is
    trained, or one above it, without which the worker serves nobody.

    ``on_gone`` runs in that thread: the main thread may be inside a collective or a kernel for long.
    """

    def __init__(self, manifests: list[Manifest], on_gone: Callable[[ServerGoneError], None]) -> None:
        self._manifests = manifests
        self._on_gone = on_gone
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="server-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _watch(self) -> None:
        named = processes_of(self._manifests)
        with contextlib.ExitStack() as stack:
            ends = select.poll()
            for process in named:
                with contextlib.suppress(ProcessLookupError):  # ended already, as the first look finds
                    descriptor = os.pidfd_open(process.pid)
                    stack.callback(os.close, descriptor)
                    ends.register(descriptor, select.POLLIN)
            while not (ended := [process for process in named if not process.identity.alive()]):
                ends.poll(POLL_SECONDS * 1000)  # returns at once when one ends
                if self._stop.is_set():
                    return
        left = end_survivors_advice(survivors(self._manifests))
        self._on_gone(
            ServerGoneError(
                f"server {self._manifests[0].instance_id}: got the end of {', '.join(map(str, ended))}, expected a running "
                "vLLM; the trained weights are lost but for the last checkpoint. Start the server, then the trainer"
                f"{left}"
            )
        )
