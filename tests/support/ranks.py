"""run_ranks(fn, world_size, *args): run a test function on several gloo ranks, with a deadline and readable failures.

A file:// rendezvous in a temporary folder: no ports to collide. ``fn(tp, *args)`` must be a module-level function.

Importing torch and transformers takes a process many times longer than most functions. So each rank has an origin: a
process, spawned once, that imports them and then forks a process for every call. Nothing is left over from one call to the
next, and a rank may die, hang or change global state as it likes. Where the imports start threads (torch with CUDA), whose
locks a fork would leave taken, an origin is the rank of one call and ends.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from apollo_tp.distributed.tp_group import TPGroup

_IMPORTED = ("pytest", "apollo_tp.training.trainer", "apollo_tp.checkpoint", "tests.support.exactness")
"""Modules that origins import. A missing one only costs time."""
_ENDED = "ended"


class _Origin:
    """The process that a rank's processes are forked from. Each rank has its own, with its own hash seed, as in a
    trainer: ranks that order collectives by a set of strings, for example, must not agree by chance."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_fork_for_each_call, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def discard(self) -> None:
        """End it, and the rank that runs now."""
        with contextlib.suppress(ProcessLookupError):  # it ends before it has a group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5)
        self.connection.close()


_origins: list[_Origin] = []


def start_origins(number: int) -> None:
    """Start the origins of the first ranks unless they run, as ``run_ranks`` does, so that they import meanwhile."""
    _origins.extend(_Origin() for _ in range(number - len(_origins)))


def _fork_for_each_call(connection: Any) -> None:
    """The life of an origin: after the result of each rank, if there is one, it sends the exit status of its process."""
    os.setpgid(0, 0)
    for name in _IMPORTED:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1 or torch.version.cuda, (
        f"got {len(threads)} threads, expected one: every call would import again"
    )
    gc.freeze()
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        if len(threads) > 1:
            _rank_main(connection, call)
            connection.send_bytes(pickle.dumps((None, _ENDED)))
            return
        if (pid := os.fork()) == 0:
            try:
                _rank_main(connection, call)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send_bytes(pickle.dumps((None, status)))


def _rank_main(connection: Any, call: bytes) -> None:
    torch.set_num_threads(1)
    try:
        environment, rank, world_size, folder, fn, args = pickle.loads(call)
        os.environ.clear()
        os.environ.update(environment | {"GLOO_SOCKET_IFNAME": "lo"})
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        dist.barrier()  # a rank that is done at once must not close sockets to which another still connects
        connection.send_bytes(pickle.dumps((True, fn(TPGroup(rank, world_size, dist.group.WORLD), *args))))
        _await_the_others(dist.distributed_c10d._get_default_store(), world_size)
    except BaseException:  # noqa: BLE001 - the traceback is the result of this process
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()


def _await_the_others(store: dist.Store, world_size: int) -> None:
    """Wait some seconds until all ranks have a result: a peer may still join a group that this rank has joined. Not a
    collective, since a peer may wait in one until this rank ends."""
    deadline = time.monotonic() + 3
    store.add("done", 1)
    while store.add("done", 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.005)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, deadline_seconds: float = 120.0) -> list[Any]:
    """Results of ``fn(tp, *args)`` per rank, pickled. Raises AssertionError with the first failing rank's traceback.

    Size 1 runs in this process.
    """
    if world_size == 1:
        return [fn(TPGroup.single(), *args)]
    deadline = time.monotonic() + deadline_seconds
    start_origins(world_size)
    connections = [origin.connection for origin in _origins[:world_size]]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank, connection in enumerate(connections):
                connection.send_bytes(pickle.dumps((dict(os.environ), rank, world_size, folder, fn, args)))
            results = _collect(connections, deadline)
            go_on = _await_ends(connections)
        except BaseException:
            _discard_origins()
            raise
    if not go_on:
        _discard_origins()
    return results


def _collect(connections: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        for rank, connection in enumerate(connections):
            if rank in results or not connection.poll(0.01):
                continue
            try:
                ok, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                ok, value = False, "its origin ended"
            if ok is None:
                value = f"the process ended without a result, exit status {value}"
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        if time.monotonic() > deadline:
            missing = [r for r in range(len(connections)) if r not in results]
            raise AssertionError(f"ranks {missing} did not finish in time")
    return [results[rank] for rank in range(len(connections))]


def _await_ends(connections: list[Any]) -> bool:
    """Wait for the end of all ranks. Each ends as soon as its result is sent, which wakes ranks that wait for it in a
    collective. Returns whether all origins can run another call."""
    statuses = []
    for rank, connection in enumerate(connections):
        assert connection.poll(10), f"rank {rank} did not end after its result"
        statuses.append(pickle.loads(connection.recv_bytes())[1])
        assert statuses[-1] in (0, _ENDED), f"rank {rank} ended with exit status {statuses[-1]} after its result"
    return _ENDED not in statuses


def _discard_origins() -> None:
    while _origins:
        _origins.pop().discard()
