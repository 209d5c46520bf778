"""One rank's life: start-up in stages, then commands until it is stopped, then everything undone in reverse order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from apollo_tp.config import Config
from apollo_tp.errors import ServerGoneError
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.launch.services import Services
from apollo_tp.launch.stages import Ready, bind, join_ranks, map_server, prepare
from apollo_tp.runtime import instance_folder
from apollo_tp.training.coordinator_link import Link
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import commands

log = logging.getLogger("apollo_tp")


def run(config: Config, on_server_gone: Callable[[ServerGoneError], None]) -> None:
    """Train one server until stopped. Every rank calls it.

    ``on_server_gone`` is called in a thread when the server has ended. Raises ApolloTpError with what is wrong and what to
    do.
    """
    with contextlib.ExitStack() as stack:
        joined = join_ranks(config, stack)
        served = map_server(joined, on_server_gone)
        bound = bind(served)
        serve(prepare(bound))


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
