"""Write a checkpoint while training goes on: stop for a copy to host memory, and write that from a thread of each rank.

The threads tell each other how far they are through the store in which the ranks have met: collectives belong to the main
threads, which train. Rank 0's has the result. A rank that dies takes all others with it, and leaves a folder without a name.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch.distributed as dist

from apollo_tp.checkpoint import checksum
from apollo_tp.checkpoint import folder as folders
from apollo_tp.checkpoint.transfers import HostMemory, Transfers, needed
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.errors import ApolloTpError, CheckpointError
from apollo_tp.optim import Optimizer

POLL_SECONDS = 0.02
ROOM_SHARE = 0.5
"""Of the host's free memory, as much may be taken by the copies of all ranks."""


class _Part(msgspec.Struct):
    """What a rank's thread tells rank 0's: the checksums of what it has written, or its error."""

    error: str = ""
    weights: dict[str, int] = {}
    state: dict[str, int] = {}


@dataclass
class Written:
    """What became of a checkpoint: its folder and size, or why there is none."""

    path: Path
    num_bytes: int
    seconds: float
    weight_version: int
    error: str


class WriteBehind:
    """At most one checkpoint at a time. ``store`` is that of all ranks; None for one process. A rank waits for the others'
    threads for at most ``seconds``. With ``keep_memory`` that of the copies is kept for the next checkpoint."""

    def __init__(
        self, writer: CheckpointWriter, store: dist.Store | None, seconds: float, *, keep_memory: bool = True
    ) -> None:
        self._writer, self._seconds, self._keep_memory = writer, seconds, keep_memory
        self._memory = HostMemory()
        self._store: dist.Store = store or dist.HashStore()
        self._thread: threading.Thread | None = None
        self.written: Written | None = None
        """Of rank 0: the outcome of the last one, once it is known."""

    def begin(self, name: str, optimizer: Optimizer, weight_version: int, kept: Sequence[str] = ()) -> bool:
        """Copy what this rank writes, and start to write it. Returns False on all ranks, and does nothing, if a host has no
        room for the copies. Collective: one all-reduce, and one all-gather over replicas if there are several."""
        from apollo_tp.checkpoint import optimizer_state  # takes a second to import

        writer, started = self._writer, time.monotonic()
        boxes, state = list(writer.own_boxes()), optimizer_state.snapshot(optimizer)
        tensors = [*(box.values for box in boxes), *(piece.tensor for piece in state.pieces)]
        self.join()
        more = max(0, needed(tensors) - self._memory.num_bytes)
        if writer.any_rank(more * writer.num_ranks > ROOM_SHARE * host_room()):
            return False
        with Transfers(optimizer.device) as transfers:
            copies = iter(self._memory.copies(tensors, transfers))
        boxes = [replace(box, values=next(copies)) for box in boxes]
        state = replace(state, pieces=[replace(piece, tensor=next(copies)) for piece in state.pieces])
        info = writer.info(optimizer, weight_version)
        self.written = None

        def write() -> _Part:
            partial = writer.partial_path(name)
            part = _Part(weights=writer.write_boxes(boxes, partial))
            optimizer_state.write_part(state, partial / folders.OPTIMIZER_DIR)
            part = msgspec.structs.replace(part, state=optimizer_state.checksums(state.pieces))
            if not self._keep_memory:
                self._memory.release()
            return part

        def complete(parts: Sequence[_Part]) -> None:
            sums = checksum.add(part.state for part in parts)
            optimizer_state.write_counters(state, writer.partial_path(name) / folders.OPTIMIZER_DIR, sums)
            writer.complete(name, info, checksum.add(part.weights for part in parts), kept)

        run = functools.partial(self._run_other, name, write)
        if writer.rank == 0:
            run = functools.partial(self._run_first, name, write, complete, started, weight_version)
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        return True

    def join(self) -> None:
        """Wait until this rank has written its part; on rank 0, until all is complete."""
        if self._thread is not None:
            self._thread.join()

    def _run_first(
        self,
        name: str,
        write: Callable[[], _Part],
        complete: Callable[[Sequence[_Part]], None],
        started: float,
        weight_version: int,
    ) -> None:
        writer, error, size = self._writer, "", 0
        final = writer.root / name
        try:
            self._guarded(lambda: writer.prepare(name), f"{name}/ready")
            own = self._told(write)
            parts = [own, *(self._wait_for_part(f"{name}/{rank}") for rank in range(1, writer.num_ranks))]
            failed = next((each.error for each in parts if each.error), "")
            if failed:
                raise CheckpointError(failed)
            complete(parts)
            size = writer.size_of(final)
        # Whatever it is, somebody waits for the checkpoint, and training goes on.
        except Exception as caught:  # noqa: BLE001
            error = f"{type(caught).__name__}: {writer.explain(caught) if isinstance(caught, OSError) else caught}"
            folders.discard(writer.root, name)
        self.written = Written(final, size, time.monotonic() - started, weight_version, error)

    def _run_other(self, name: str, write: Callable[[], _Part]) -> None:
        try:
            if not self._wait_for_part(f"{name}/ready").error:
                self._store.set(f"checkpoint/{name}/{self._writer.rank}", msgspec.msgpack.encode(self._told(write)))
        except (ApolloTpError, dist.DistError):  # rank 0 is gone, and this process goes with it
            return

    def _guarded(self, action: Callable[[], object], key: str) -> None:
        """Run ``action``, and tell the other ranks' threads that it is done, or that there is nothing to wait for."""
        part = _Part(error="not done")
        try:
            action()
            part = _Part()
        finally:
            self._store.set(f"checkpoint/{key}", msgspec.msgpack.encode(part))

    def _told(self, write: Callable[[], _Part]) -> _Part:
        """This rank's part, or why it could not be written."""
        try:
            return write()
        except Exception as error:  # noqa: BLE001 - rank 0 reports it
            text = self._writer.explain(error) if isinstance(error, OSError) else str(error)
            return _Part(error=f"rank {self._writer.rank}: {text}")

    def _wait_for_part(self, key: str) -> _Part:
        # not store.wait, which would keep the main thread from using the store meanwhile
        deadline = time.monotonic() + self._seconds
        while not self._store.check([f"checkpoint/{key}"]):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"checkpoint {key}: got no sign of that rank for {self._seconds:.0f} s, expected one"
                )
            time.sleep(POLL_SECONDS)
        return msgspec.msgpack.decode(self._store.get(f"checkpoint/{key}"), type=_Part)


def host_room() -> float:
    """Bytes that this process can still take: of the host's memory, and of its control group's."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    room = float(lines["MemAvailable"].split()[0]) * 1024
    try:
        base = Path("/sys/fs/cgroup")
        limit = float((base / "memory.max").read_text())  # "max" is no number
        used = float((base / "memory.current").read_text())
        stat = dict(line.split() for line in (base / "memory.stat").read_text().splitlines())
        room = min(room, limit - used + float(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return room
