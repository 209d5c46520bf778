"""How a rank that has failed wakes the others, which may wait for it on their device or in a collective."""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch.distributed as dist

from apollo_tp.distributed.control import Control
from apollo_tp.distributed.remote_ranks import SILENT_SECONDS, RemoteRanks
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import DeadlineError
from apollo_tp.runtime import processes
from apollo_tp.runtime.processes import ProcessId

log = logging.getLogger("apollo_tp")

POLL_SECONDS = 0.25
GRACE_SECONDS = 2.0
"""How long ranks have to notice a failure by themselves. What they have launched completely still ends in this time."""
LEAVE_SECONDS = 10.0
"""How long ranks have to leave by themselves once those of another host are gone. A connection that is cut is not closed:
without this, they would wait for each other until the deadline of a collective, also while they are idle."""
_BYTES = 4


def _raise(error: Exception) -> None:
    raise error


class Alarm:
    """One number in shared memory for each rank: the epoch in which it failed. An epoch is the life of a compute group.

    All ranks count epochs together (``next_epoch``), so numbers of an earlier epoch mean nothing.
    ``ranks`` are the processes of all ranks of this host; ``memory`` has four bytes for each rank of the job, and is the
    same for all of this host; ``remote`` carries the numbers to other hosts, and theirs here.
    """

    def __init__(
        self,
        rank: int,
        ranks: Sequence[ProcessId],
        memory: mmap.mmap | bytearray,
        remote: RemoteRanks | None = None,
    ) -> None:
        self._rank, self._ranks, self._remote = rank, list(ranks), remote
        self._failed = memoryview(memory).cast("i")
        self._epoch = 1
        self.on_lost: Callable[[DeadlineError], None] = _raise
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def join(cls, control: Control, store: dist.Store | None = None) -> Alarm:
        """The alarm of all ranks, which run as one user. ``store`` is needed where they are on several hosts. Collective:
        one gather, two agreements."""
        own = os.memfd_create("apollo_tp_alarm", os.MFD_CLOEXEC)  # that of a host's first rank is used
        os.ftruncate(own, _BYTES * control.size)
        me, machine = ProcessId.of(os.getpid()), processes.machine()
        assert me is not None
        row = msgspec.json.encode((machine, me.pid, me.start_ticks, own))
        rows = [msgspec.json.decode(row) for row in control.gather(row)]
        here = [(pid, ticks, fd) for where, pid, ticks, fd in rows if where == machine]
        others = [rank for rank, (where, *_) in enumerate(rows) if where != machine]
        with control.agree():
            shared = os.open(f"/proc/{here[0][0]}/fd/{here[0][2]}", os.O_RDWR | os.O_CLOEXEC)
            memory = mmap.mmap(shared, _BYTES * control.size)
            os.close(shared)
        os.close(own)
        with control.agree():
            assert store is not None or not others, "ranks on several hosts need a store"
            remote = RemoteRanks(store, control.rank, others) if store is not None and others else None
        return cls(control.rank, [ProcessId(pid, ticks) for pid, ticks, _ in here], memory, remote)

    def ring(self) -> None:
        """This rank has failed, or must not be waited for any longer. From any thread."""
        self._failed[self._rank] = self._epoch

    def is_ringing(self) -> bool:
        """Whether a rank has failed in this epoch."""
        return self._epoch in self._failed.tolist()

    def all_run(self) -> bool:
        """Whether the processes of all ranks run, as far as is known of other hosts."""
        return all(rank.alive() for rank in self._ranks) and (self._remote is None or self._remote.all_run())

    def next_epoch(self) -> None:
        """On all ranks, once they have agreed on a failure and before they form a compute group again. Local."""
        self._epoch += 1

    def watch(self, tp: TPGroup) -> None:
        """Start a thread that aborts ``tp`` GRACE_SECONDS after a rank has failed or ended, if this rank still waits in it.

        Work that waits on the device then runs on with whatever is in its memory, so what it computes must not be used:
        see ``TPGroup`` for canaries, and ``PeerBuffers.intact``. Where ranks of other hosts are gone for LEAVE_SECONDS,
        ``on_lost`` is called in the thread, with the reason why this process must end.
        """
        if tp.size > 1:
            self._thread = threading.Thread(target=self._watch, args=(tp,), name="alarm", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _watch(self, tp: TPGroup) -> None:
        aborted = None
        while not self._stop.wait(POLL_SECONDS):
            if self._remote is not None:
                for rank, failed in self._remote.exchange(self._failed[self._rank]).items():
                    self._failed[rank] = failed
                if self._remote.gone_seconds() > LEAVE_SECONDS:
                    self.on_lost(
                        DeadlineError(
                            f"rank {self._rank}: got no sign of ranks on another host for {SILENT_SECONDS:.0f} s, "
                            "expected one every second; the host or the network has failed, or their trainer has ended. "
                            "Start the trainer again, on all hosts; a job goes on at its next step"
                        )
                    )
            group, epoch = tp.group, self._epoch
            if group is None or group is aborted or not (self.is_ringing() or not self.all_run()):
                continue
            if self._remote is not None and self.is_ringing():
                self._remote.exchange(self._failed[self._rank])  # before this thread waits
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and tp.group is group:
                if self._stop.wait(POLL_SECONDS):
                    return
            if tp.group is group and self._epoch == epoch:
                log.error(
                    "rank %d: another rank failed or ended: the collectives that wait for it are aborted", self._rank
                )
                tp.abort()
                aborted = group
