"""What trainer ranks on other hosts say of themselves, through the store in which all ranks found each other."""

from __future__ import annotations

import datetime
import logging
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

    Used by one thread. A store that does not answer counts as ranks that have ended: it ends with the launcher of rank 0.
    """

    def __init__(self, store: dist.Store, rank: int, others: Sequence[int]) -> None:
        """Raises RuntimeError if the store does not answer."""
        self._store = store.clone()  # a connection of its own: another thread may wait in the first one for long
        self._store.set_timeout(datetime.timedelta(seconds=STORE_SECONDS))
        self._key, self._keys = f"alarm/{rank}", {other: f"alarm/{other}" for other in others}
        self._count, self._lost = 0, False
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._store.set(self._key, "0 0")

    def exchange(self, failed: int) -> dict[int, int]:
        """Tell the others the epoch in which this rank failed; returns theirs, empty if the store does not answer."""
        self._count += 1
        try:
            self._store.set(self._key, f"{failed} {self._count}")
            rows = dict(zip(self._keys, self._store.multi_get(list(self._keys.values())), strict=True))
        except RuntimeError as error:  # torch's DistError among them
            if not self._lost:
                log.warning("the store of the ranks does not answer (%s): the launcher of rank 0 has ended", error)
            self._lost = True
            return {}
        now = time.monotonic()
        for rank, row in rows.items():
            if rank not in self._heard or self._heard[rank][0] != row:
                self._heard[rank] = row, now
        return {rank: int(row.split()[0]) for rank, row in rows.items()}

    def all_run(self) -> bool:
        """Whether all of them have counted on lately, as ``exchange`` found it."""
        oldest = time.monotonic() - SILENT_SECONDS
        return not self._lost and all(since > oldest for _, since in self._heard.values())
