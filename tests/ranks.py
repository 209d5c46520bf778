"""run_ranks(fn, world_size, *args): run a test function on several gloo ranks, with a deadline and readable failures.

A file:// rendezvous in a temporary folder: no ports to collide. ``fn(tp, *args)`` must be a module-level function.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from apollo_tp.parallel import TPGroup


def _rank_main(rank: int, world_size: int, folder: str, connection: Any, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        connection.send((True, fn(TPGroup(rank, world_size, dist.group.WORLD), *args)))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the traceback is the result of this process
        connection.send((False, traceback.format_exc()))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, deadline_seconds: float = 120.0) -> list[Any]:
    """Results of ``fn(tp, *args)`` per rank. Raises AssertionError with the first failing rank's traceback.

    Results cross a pipe: return CPU tensors as numpy arrays or lists, or clones. Size 1 runs in this process.
    """
    if world_size == 1:
        return [fn(TPGroup.single(), *args)]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes, connections = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, world_size, folder, theirs, fn, args), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 5)
            stack.callback(process.terminate)
            processes.append(process)
            connections.append(ours)
        return _collect(connections, time.monotonic() + deadline_seconds)


def _collect(connections: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        for rank, connection in enumerate(connections):
            if rank in results or not connection.poll(0.01):
                continue
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = False, "the process ended without a result"
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        if time.monotonic() > deadline:
            missing = [r for r in range(len(connections)) if r not in results]
            raise AssertionError(f"ranks {missing} did not finish in time")
    return [results[rank] for rank in range(len(connections))]
