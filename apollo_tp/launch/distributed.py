"""Join the trainer ranks of torchrun or of mpirun (rank, size and rendezvous through mpi4py), or be the only one."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from dataclasses import dataclass

import torch.distributed as dist

from apollo_tp.errors import DeadlineError
from apollo_tp.launch.launcher import Launched, launched

JOIN_SECONDS = 60.0
"""How long the ranks wait for each other. A launcher starts all of them at once."""
LOOPBACK = "127.0.0.1"

log = logging.getLogger("apollo_tp")


@dataclass(frozen=True)
class World:
    """This rank's place among all trainer ranks. The default process group is gloo, for control messages only."""

    rank: int
    size: int
    store: dist.Store | None = None
    """Through which the ranks found each other."""
    timeout_seconds: float = 0.0
    """The deadline of a control message."""


def join(timeout_seconds: float, join_seconds: float = JOIN_SECONDS) -> World:
    """Initialise the default process group (gloo), whose collectives have the deadline ``timeout_seconds``. Collective over
    all ranks of the job. Raises DeadlineError, naming the ranks that are missing, after ``join_seconds``."""
    place = launched()
    if place.by == "nobody":
        store: dist.Store = dist.HashStore()
    elif place.by == "mpi":
        store = _store_of_mpi(join_seconds)
        _await_all(store, place, join_seconds)
    else:
        store = _store_of_torchrun(place, join_seconds)
        _await_all(store, place, join_seconds)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=timeout)
    return World(place.rank, place.size, store, timeout_seconds)


def leave() -> None:
    """Leave the default process group, if this rank is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def renumber(world: World, rank: int, size: int) -> World:
    """Form the default process group again of ``size`` ranks with other numbers; ``rank`` is this one's. One that is not
    below ``size`` is in no group afterwards. Collective over all ranks of ``world``.

    New process groups order their ranks by these numbers, and tensor-parallel ranks must be in the server's order. Raises
    DeadlineError if a rank does not come.
    """
    assert world.store is not None
    store = dist.PrefixStore("renumbered", world.store)
    _await_all(store, Launched("torchrun", rank, world.size), JOIN_SECONDS)  # nobody waits in the old group any more
    dist.destroy_process_group()
    timeout = datetime.timedelta(seconds=world.timeout_seconds)
    if rank < size:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, store, world.timeout_seconds)


def _store_of_torchrun(place: Launched, join_seconds: float) -> dist.Store:
    """The store of torchrun's agent, with a prefix for each attempt: with ``--max-restarts`` the agent may keep its store,
    and with it the keys of the ranks that ended. Raises DeadlineError if nothing answers."""
    environment = os.environ
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if environment.get("LOCAL_WORLD_SIZE") == str(place.size):
        host = LOOPBACK  # the host's own name need not resolve
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    log.info(
        "joining %d ranks through %s:%d, attempt %s, for up to %.0f s", place.size, host, port, attempt, join_seconds
    )
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            place.size,
            is_master=not hosted and place.rank == 0,
            timeout=datetime.timedelta(seconds=join_seconds),
            wait_for_workers=False,
            multi_tenant=not hosted,
        )
    except dist.DistError as error:
        raise DeadlineError(
            f"rank {place.rank}: got no store at {host}:{port} within {join_seconds:.0f} s ({_first_line(error)}), expected "
            "torchrun's; check that MASTER_ADDR resolves and MASTER_PORT is reachable"
        ) from error
    return dist.PrefixStore(f"apollo_tp/attempt_{attempt}", store)


def _await_all(store: dist.Store, place: Launched, join_seconds: float) -> None:
    """Wait until all ranks have reached this line. Raises DeadlineError naming those that have not."""
    keys = {f"joined/{rank}": rank for rank in range(place.size)}
    store.set(f"joined/{place.rank}", b"1")
    try:
        store.wait(list(keys), datetime.timedelta(seconds=join_seconds))
    except dist.DistError as error:
        missing = [rank for key, rank in keys.items() if not store.check([key])]
        raise DeadlineError(
            f"rank {place.rank}: got no sign of ranks {missing} of {place.size} for {join_seconds:.0f} s, expected all of "
            "them to join; look for their errors above, and start the trainer again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _store_of_mpi(join_seconds: float) -> dist.Store:
    """Rank 0 opens a store on a port that the system chose; MPI tells the others where. On several hosts they reach it under
    $MASTER_ADDR, else under the name of rank 0's host. Raises DeadlineError if one does not."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    host = (os.environ.get("MASTER_ADDR") or socket.gethostname()) if _several_hosts(world) else LOOPBACK
    log.info("joining %d ranks through MPI, for up to %.0f s", size, join_seconds)
    store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = bytearray(8)
    address = bytearray(256)
    if store is not None:
        port[:] = store.port.to_bytes(8, "little")
        address[: len(host)] = host.encode()
    world.Bcast(port, root=0)  # the buffer forms: the lower-case ones would pickle
    world.Bcast(address, root=0)
    if store is None:
        name, number = address.rstrip(b"\0").decode(), int.from_bytes(port, "little")
        timeout = datetime.timedelta(seconds=join_seconds)
        try:
            store = dist.TCPStore(name, number, size, timeout=timeout)
        except dist.DistError as error:
            raise DeadlineError(
                f"rank {rank}: got no store at {name}:{number} within {join_seconds:.0f} s ({_first_line(error)}), expected "
                "rank 0's; where its host's name does not resolve, set MASTER_ADDR to its address: mpirun -x MASTER_ADDR=..."
            ) from error
    return store


def _several_hosts(world: object) -> bool:
    from mpi4py import MPI

    assert isinstance(world, MPI.Comm)
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    return bool(node.Get_size() < world.Get_size())
