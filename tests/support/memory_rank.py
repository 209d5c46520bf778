"""``python -m tests.support.memory_rank SEEN MACHINES NUMBER SAVE OVERRIDES``: a trainer rank without a coordinator, which
makes one step beside servers of ``memory_servers`` and says on its standard output what came of it.

SEEN and MACHINES are JSON: the shard that each rank sees, (server, tensor-parallel rank), and the machine that it is on, or
null. NUMBER is the step's; SAVE the name of a checkpoint after it, or empty.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence

from apollo_tp.config import Config
from apollo_tp.inspect.exactness import samples
from apollo_tp.launch import coordinates
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.launch.services import Services
from apollo_tp.launch.session import await_server
from apollo_tp.launch.stages import bind, join_ranks, map_server, prepare, take_place
from apollo_tp.runtime import processes
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import commands


def be_on(machine: str, config: Config) -> None:
    """As if this rank ran on that machine, with a runtime folder and a name of its own."""
    processes.machine = lambda: f"machine {machine}"
    socket.gethostname = lambda: f"host-{machine}"
    config.server.runtime_dir += f"-{machine}"


def train(config: Config, seen: Sequence[tuple[str, int]] | None, number: int, save: str) -> None:
    with contextlib.ExitStack() as stack:
        joined = join_ranks(config, stack)
        if seen:  # as if each rank saw the GPU of one shard alone
            own = coordinates.ServedRank(*seen[joined.world.rank])
            coordinates._offered = lambda servers: [own]
        placed = take_place(joined)
        if placed.own is None:
            print(f"SPARE {joined.world.rank}.", flush=True)
            await_server(placed)
        ready = prepare(bind(map_server(placed, lambda error: None), lambda error: None))
        loop = RankLoop(ready.trainer, Services(ready), ready.control, None)
        reply = loop.execute(commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=samples(seed=number)))
        assert isinstance(reply, commands.StepDone), reply
        if save:
            reply = loop.execute(commands.SaveCheckpoint(id="c", name=save))
            assert isinstance(reply, commands.CheckpointDone), reply
        print(f"PEERS {ready.mesh.tp.peers.enabled}.", flush=True)
        print(f"VERSION {ready.trainer.weight_version} of {ready.folder.name} on {ready.world.rank}.", flush=True)


def main(seen: str, machines: str, number: str, save: str, *overrides: str) -> None:
    logging.basicConfig(level=logging.INFO)
    config = read_arguments(list(overrides))
    if on := json.loads(machines):
        be_on(on[int(os.environ["RANK"])], config)
    try:
        train(config, json.loads(seen), int(number), save)
    except Exception as error:
        print(f"RAISED {type(error).__name__}: {error}", flush=True)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
