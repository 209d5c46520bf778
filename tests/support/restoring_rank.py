"""``python -m tests.support.restoring_rank ARGUMENTS OPTIONS``: a trainer rank without a coordinator, from the manifests to
a few steps, checkpoints and restores. It tells rank 0's standard output what it has done.

ARGUMENTS is JSON: ``do`` is a list of "step N", "save NAME", "restore NAME", "hold NAME" (a snapshot in memory) and
"back NAME FALLBACK"; ``kill`` the rank that kills itself, at its ``place``-th event of a restore, counted from 1: a part of
a tensor that is read or written, or a record that is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from apollo_tp.checkpoint import host_snapshot
from apollo_tp.checkpoint.lineage import LineageFile
from apollo_tp.checkpoint.restore import Restore
from apollo_tp.checkpoint.transfers import Transfers
from apollo_tp.inspect.exactness import samples
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.launch.services import Services
from apollo_tp.launch.stages import bind, join_ranks, map_server, prepare, take_place
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import commands


def _kill_at(place: int) -> list[None]:
    """From now on, count the events of restores, and die at this one; returns a list that grows by one with each."""
    events: list[None] = []
    lock = threading.Lock()

    def event() -> None:
        with lock:  # parts are read by several threads
            events.append(None)
            if len(events) == place:
                os.kill(os.getpid(), signal.SIGKILL)

    read, update = Restore._values, LineageFile.update

    def counted_read(self: Restore, *arguments: Any) -> Tensor:
        event()
        return read(self, *arguments)

    class Counted(Transfers):
        def to_device(self, values: Tensor) -> Tensor:
            event()
            return super().to_device(values)

    def counted_update(self: LineageFile, **changes: Any) -> None:
        event()
        update(self, **changes)
        event()

    Restore._values = counted_read  # type: ignore[method-assign]
    host_snapshot.Transfers = Counted  # type: ignore[misc]
    LineageFile.update = counted_update  # type: ignore[method-assign]
    return events


def _command(what: str, argument: str) -> commands.AnyCommand:
    match what:
        case "step":
            number = int(argument)
            batch = samples(seed=number)
            return commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=batch)
        case "save":
            return commands.SaveCheckpoint(id="save", name=argument)
        case "hold":
            return commands.SaveCheckpoint(id="save", name=argument, snapshot=True)
        case "back":
            name, fallback = argument.split()
            return commands.RestoreCheckpoint(id="restore", name=name, restore_id=f"of {name}", fallback=fallback)
        case _:
            return commands.RestoreCheckpoint(id="restore", name=argument, restore_id=f"of {argument}")


def main(arguments: dict[str, Any], options: list[str], say: Callable[[str], None]) -> None:
    with contextlib.ExitStack() as stack:
        placed = take_place(join_ranks(read_arguments(options), stack))  # type: ignore[arg-type]
        ready = prepare(bind(map_server(placed, lambda error: None), lambda error: None))
        say(f"READY {ready.trainer.weight_version} {ready.optimizer.step_count}")
        loop = RankLoop(ready.trainer, Services(ready), ready.control, None)
        for each in arguments["do"]:
            what, _, argument = each.partition(" ")
            events: list[None] = []
            if what in ("restore", "back") and arguments.get("kill") == ready.world.rank:
                events = _kill_at(arguments["place"])
            reply = loop.execute(_command(what, argument))
            assert not isinstance(reply, commands.CommandFailed), reply
            say(f"DONE {each} {ready.trainer.weight_version}, {len(events)} events")


if __name__ == "__main__":
    is_first = os.environ["RANK"] == "0"
    main(json.loads(sys.argv[1]), sys.argv[2:], lambda text: print(text, flush=True) if is_first else None)
