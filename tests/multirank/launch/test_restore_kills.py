"""kill -9 of a rank at any moment of a restore: the weights are the old ones, the new ones, or completed at the next start.

The server is this process, which holds its memory; trainers are forked and go through all stages of the launch.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.memory_servers import Host, Server, equal
from tests.support.processes import FORKING_TORCHRUN, ManagedProcess


class Trainers:
    """Trainers of ``server``, one after the other."""

    def __init__(self, host: Host, server: Server) -> None:
        self.host, self.server, self.count = host, server, 0

    def run(self, do: list[str], **kill: int) -> tuple[int, str]:
        """Exit status and output of one that does this."""
        self.count += 1
        base = self.host.base
        command = [
            "python", "-m", FORKING_TORCHRUN, "--standalone", "--nproc-per-node", str(self.server.tp_size),
            "-m", "tests.support.restoring_rank", json.dumps({"do": do} | kill),
            "service.http.port=0", "train.max_micro_batch_tokens=64", "train.max_sequence_tokens=64", "optim.rank=8",
            "optim.lr=1e-3", "optim.max_relative_update=1.0", "server.wait_seconds=5", f"server.runtime_dir='{base}/rt'",
            f"checkpoint.dir='{base}/checkpoints'", f"service.state_dir='{base}/state'", "train.threads=1",
            "checkpoint.behind=false", "checkpoint.guard_in_memory=true",
        ]  # fmt: skip
        process = ManagedProcess(command, {"OMP_NUM_THREADS": "1"}, base / f"trainer{self.count}.log")
        try:
            status = process.process.wait(120)
        finally:
            process.stop()
        return status, process.log.read_text()


@pytest.fixture
def trained(host: Host) -> tuple[Trainers, dict, dict]:
    """A server of two ranks after three steps, its weights at the checkpoint after the first one, and those of now."""
    trainers = Trainers(host, host.serve("a", 2))
    status, output = trainers.run(["step 1", "save first"])
    assert status == 0, output
    saved = trainers.server.weights()
    status, output = trainers.run(["step 2", "step 3", "save later"])
    assert status == 0, output
    return trainers, saved, trainers.server.weights()


def _copy(server: Server, weights: dict[tuple[int, str], torch.Tensor]) -> None:
    for manifest, tensors in server._mapped():
        for name, (_, local) in tensors.items():
            local.copy_(weights[manifest.tp_rank, name])


def _kill(trained: tuple[Trainers, dict, dict], points: list[tuple[int, float]]) -> Counter[str]:
    """For each (rank, share of a restore's events) a trainer that is killed there, the next one, and one that makes a step.
    Returns how often the kill left what."""
    trainers, saved, later = trained
    server, found = trainers.server, Counter[str]()
    first = str(Path(trainers.host.base / "checkpoints" / "first").resolve())
    record = server.record()
    status, output = trainers.run(["restore first", "step 9"], kill=0, place=0)
    assert status == 0, output
    expected = server.weights()
    count = int(re.findall(r"DONE restore first \d+, (\d+) events", output)[0])
    for rank, share in points:
        place = 1 + int(share * count)
        _copy(server, later)
        server.change_record(**record)
        status, output = trainers.run(["restore first"], kill=rank, place=place)
        if status == 0:  # events are counted on rank 0; the other one has fewer
            assert rank == 1, output
            assert equal(server.weights(), saved)
            found["after the end"] += 1
            continue
        left, restoring = server.weights(), server.record()["restoring"]
        assert restoring in ("", first)
        whole = "old" if equal(left, later) else "new" if equal(left, saved) else "torn"
        found[whole] += 1
        assert restoring or whole != "torn", (rank, place)
        completes = bool(restoring)
        status, output = trainers.run([])
        assert status == 0, output
        assert ("that is completed first" in output) == completes
        after = server.weights()
        assert equal(after, saved) or (whole == "old" and not completes and equal(after, later)), (rank, place, whole)
        assert server.record()["restoring"] == ""
        if equal(after, saved):
            assert server.version() > record["weight_version"]
            status, output = trainers.run(["step 9"])
            assert status == 0, output
            assert "READY" in output
            assert equal(server.weights(), expected), "the step after it is another one"
    return found


def test_a_killed_restore_is_completed(trained: tuple[Trainers, dict, dict]) -> None:
    """In the middle of its writes."""
    assert _kill(trained, [(1, 0.75)]) == {"torn": 1}


def test_a_killed_rollback_from_memory_is_completed_with_the_checkpoint(trained: tuple[Trainers, dict, dict]) -> None:
    """The snapshot is lost with the trainer. The one that does not hold it restores the checkpoint, and says so."""
    trainers, _, later = trained
    server, record = trainers.server, trainers.server.record()
    status, output = trainers.run(["step 4"])
    assert status == 0, output
    held = server.weights()
    _copy(server, later)
    server.change_record(**record)
    do = ["step 4", "hold held", "step 5", "back held later"]
    status, output = trainers.run(do, kill=0, place=0)
    assert status == 0, output
    assert equal(server.weights(), held)
    assert (server.record()["restoring"], server.record()["restore_id"]) == ("", "of held")
    count = int(re.findall(r"DONE back held later \d+, (\d+) events", output)[0])
    _copy(server, later)
    server.change_record(**record)
    status, output = trainers.run(do, kill=1, place=count // 8)  # weights come before the state
    assert status != 0, output
    assert not equal(server.weights(), held)
    assert not equal(server.weights(), later)
    folder = str(Path(trainers.host.base / "checkpoints" / "later").resolve())
    assert (server.record()["restoring"], server.record()["restore_id"]) == (folder, record["restore_id"])
    status, output = trainers.run(["back held later"])
    assert status == 0, output
    assert "that is completed first" in output
    assert equal(server.weights(), later)
    assert (server.record()["restoring"], server.record()["restore_id"]) == ("", "of held/lost")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_points_of_a_restore(
    trained: tuple[Trainers, dict, dict], request: pytest.FixtureRequest
) -> None:
    """A few of them; 40 with ``--hostile-long``."""
    draw = random.Random("restore")
    count = 40 if request.config.getoption("--hostile-long") else 5
    found = _kill(trained, [(draw.randrange(2), draw.random()) for _ in range(count)])
    assert found.total() == count
    assert found["after the end"] <= count / 5
    assert found["torn"] >= count / 7
