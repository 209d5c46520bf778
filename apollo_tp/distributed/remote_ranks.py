"""What trainer ranks on other hosts say of themselves, through the store in which all ranks found each other."""

from __future__ import annotations

import datetime
import logging
import math
import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

log = logging.getLogger("apollo_tp")

SILENT_SECONDS = 20.0
"""A rank that has not counted on for so long counts as ended: its host may have lost power or network."""
STORE_SECONDS = 10.0


class RemoteRanks:
    """The ranks ``others``, on other hosts. Each rank writes two numbers for all: the epoch in which it failed (0 before the
    first failure), and a count that goes up as long as it runs.

    Used by one thread. A store that does not answer counts as ranks that have ended: it ends with the launcher of rank 0, or
    with its host.
    """

    def __init__(self, store: dist.Store, rank: int, others: Sequence[int]) -> None:
        """Raises RuntimeError if the store does not answer."""
        # a connection of its own: another thread may wait in the first one for long. torch's stub does not list it
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(datetime.timedelta(seconds=STORE_SECONDS))
        self._key, self._keys = f"alarm/{rank}", {other: f"alarm/{other}" for other in others}
        self._count = 0
        self._lost_since: float | None = None
        self._asking: threading.Thread | None = None
        self._answer: list[bytes] | RuntimeError = []
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._store.set(self._key, "0 0")

    def exchange(self, failed: int) -> dict[int, int]:
        """Tell the others the epoch in which this rank failed; returns theirs, empty if the store does not answer."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._ask, args=(failed,), name="remote-ranks", daemon=True)
            self._asking.start()
        self._asking.join(STORE_SECONDS if self._lost_since is None else 0.0)
        if self._asking.is_alive() or isinstance(self._answer, RuntimeError):
            if self._lost_since is None:
                why = "no answer" if self._asking.is_alive() else self._answer
                log.warning("the store of the ranks does not answer (%s): rank 0's launcher or host is gone", why)
                self._lost_since = time.monotonic()
            return {}
        self._lost_since, now = None, time.monotonic()
        rows = dict(zip(self._keys, self._answer, strict=True))
        for rank, row in rows.items():
            if rank not in self._heard or self._heard[rank][0] != row:
                self._heard[rank] = row, now
        return {rank: int(row.split()[0]) for rank, row in rows.items()}

    def _ask(self, failed: int) -> None:
        """One exchange, on a thread: if the store's host cannot be reached any more, the store waits in spite of its timeout
        for an answer to the message that it waits no longer (torch 2.11 to 2.13)."""
        self._count += 1
        try:
            self._store.set(self._key, f"{failed} {self._count}")
            self._answer = self._store.multi_get(list(self._keys.values()))
        except RuntimeError as error:  # torch's DistError among them
            self._answer = error

    def all_run(self) -> bool:
        """Whether all of them have counted on lately, as ``exchange`` found it."""
        return self.gone_seconds() == 0

    def gone_seconds(self) -> float:
        """For how long one of them has counted as ended, or the store has not answered; 0 if all run."""
        silent_since = min((since for _, since in self._heard.values()), default=math.inf)
        gone_since = min(silent_since + SILENT_SECONDS, math.inf if self._lost_since is None else self._lost_since)
        return max(0.0, time.monotonic() - gone_since)
