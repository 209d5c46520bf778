"""Notice the end of the server, also while this rank is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable

from apollo_tp.errors import ServerGoneError
from apollo_tp.shards.manifest import Manifest


class ServerWatch:
    """A thread per rank that notices within about a second that a vLLM worker has ended.

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
        while not self._stop.wait(1.0):
            ended = [m for m in self._manifests if not m.process.alive()]
            if ended:
                ranks = ", ".join(f"rank {m.tp_rank} (process {m.pid})" for m in ended)
                self._on_gone(
                    ServerGoneError(
                        f"server {ended[0].instance_id}: got the end of {ranks}, expected a running vLLM; the trained "
                        "weights are lost but for the last checkpoint. Start the server, then the trainer"
                    )
                )
                return
