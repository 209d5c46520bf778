"""The end of any process of the server is noticed."""

from __future__ import annotations

import queue
import subprocess
import sys

import pytest

from apollo_tp.errors import ServerGoneError
from apollo_tp.launch.server_watch import ServerWatch
from apollo_tp.runtime.processes import ProcessId
from apollo_tp.shards.manifest import Manifest
from tests.support.manifests import manifest


def _of(process: subprocess.Popen[bytes], rank: int) -> Manifest:
    identity = ProcessId.of(process.pid)
    assert identity is not None
    return manifest(rank, 2, pid=identity.pid, pid_start_ticks=identity.start_ticks)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_any_rank_of_the_server_is_noticed(rank: int) -> None:
    """Not only of the first one: trainer ranks that wait for its memory or its answer would wait for long."""
    workers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    found: queue.Queue[ServerGoneError] = queue.Queue()
    watch = ServerWatch([_of(worker, number) for number, worker in enumerate(workers)], found.put)
    try:
        with pytest.raises(queue.Empty):
            found.get(timeout=1.5)
        workers[rank].kill()
        assert f"got the end of rank {rank} (process {workers[rank].pid})" in str(found.get(timeout=10))
    finally:
        watch.stop()
        for worker in workers:
            worker.kill()
            worker.wait()
