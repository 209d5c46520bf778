"""Join the trainer ranks of torchrun or of mpirun (rank, size and rendezvous through mpi4py), or be the only one."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import torch.distributed as dist

RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class World:
    """This rank's place among all trainer ranks. The default process group is gloo, for control messages only."""

    rank: int
    size: int


def join(timeout_seconds: float) -> World:
    """Initialise the default process group (gloo). Collective over all ranks of the job."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        rank, size, store = _rendezvous_through_mpi()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size())


def _rendezvous_through_mpi() -> tuple[int, int, dist.Store]:
    """Rank 0 opens a store on a port that the system chose; MPI tells the others where."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    host = socket.gethostname() if _several_hosts(world) else "127.0.0.1"
    store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = bytearray(8)
    address = bytearray(256)
    if store is not None:
        port[:] = store.port.to_bytes(8, "little")
        address[: len(host)] = host.encode()
    world.Bcast(port, root=0)  # the buffer forms: the lower-case ones would pickle
    world.Bcast(address, root=0)
    if store is None:
        store = dist.TCPStore(
            address.rstrip(b"\0").decode(), int.from_bytes(port, "little"), size, timeout=RENDEZVOUS_TIMEOUT
        )
    return rank, size, store


def _several_hosts(world: object) -> bool:
    from mpi4py import MPI

    assert isinstance(world, MPI.Comm)
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    return bool(node.Get_size() < world.Get_size())
