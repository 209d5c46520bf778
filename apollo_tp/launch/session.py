"""One rank's life: start-up in stages, then commands until it is stopped, then everything undone in reverse order."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import NoReturn

from apollo_tp.config import Config
from apollo_tp.errors import ApolloTpError, ServerReturnedError
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.launch.hosts import is_up
from apollo_tp.launch.services import Services
from apollo_tp.launch.stages import Placed, Ready, bind, join_ranks, map_server, prepare, take_place
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import live_instances, read_instance
from apollo_tp.training.coordinator_link import Link
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import commands

AWAIT_SECONDS = 1.0

log = logging.getLogger("apollo_tp")


def run(config: Config, leave: Callable[[ApolloTpError], None]) -> None:
    """Train until stopped. Every rank calls it.

    ``leave`` is called in a thread when the server has ended, or ranks on other hosts are gone. Raises ApolloTpError with
    what is wrong and what to do.
    """
    with contextlib.ExitStack() as stack:
        placed = take_place(join_ranks(config, stack))
        if placed.own is None:
            await_server(placed)
        served = map_server(placed, leave)
        bound = bind(served, leave)
        serve(prepare(bound))


def await_server(placed: Placed) -> NoReturn:
    """What a rank without a shard does: wait until another server is up on its host, for as long as the launcher lets it.

    Raises ServerReturnedError then: the launcher starts all ranks again, and these take that server too.
    """
    base = instance_folder.base_dir(placed.config.server.runtime_dir)
    names = placed.config.server.instances
    log.info("no server for this rank, which waits for one in %s", base)
    while True:
        for name in set(live_instances(base)[0]).difference(placed.arrangement.instances):
            if (not names or name in names) and is_up(base / name, read_instance(base / name)):
                raise ServerReturnedError(
                    f"server {name} is up: all ranks must start again to train it too, which torchrun does if it is given "
                    "--max-restarts"
                )
        time.sleep(AWAIT_SECONDS)


def serve(ready: Ready) -> None:
    """Execute the coordinator's commands until stopped. Collective."""
    services = Services(ready)
    link = _begin(ready, ready.coordinator) if ready.coordinator else None
    loop = RankLoop(ready.trainer, services, ready.control, link)
    loop.stop_on_signals()
    goodbye = commands.Goodbye(reason="the trainer raised", failed=True)
    try:
        goodbye = commands.Goodbye(reason=loop.run())
        log.info("leaving: %s", goodbye.reason)
    finally:
        services.close()
        if link:
            link.close(goodbye)


def _begin(ready: Ready, coordinator: CoordinatorProcess) -> Link:
    """Let the coordinator take requests; returns the connection to it."""
    coordinator.begin(ready.folder, ready.manifests[0])
    return Link(
        f"ipc://{instance_folder.socket_path(ready.folder, instance_folder.RANKS_SOCKET)}", alive=coordinator.check
    )
