"""Trainer ranks that torchrun starts, beside servers of one host: from manifests to a step, without vLLM.

The servers are this process: it holds their memory and publishes their manifests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open

from apollo_tp.runtime import instance_folder, processes
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.manifest import Manifest, publish
from apollo_tp.shards.mapping import map_rank
from tests.support.families import CASES
from tests.support.trainers import CASE

RANK = """
import contextlib, json, logging, sys, msgspec
logging.basicConfig(level=logging.INFO)
from apollo_tp.launch import coordinates
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.launch.services import Services
from apollo_tp.launch.stages import bind, join_ranks, map_server, prepare
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import commands
from tests.support.exactness import samples

seen, number, save = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = read_arguments(sys.argv[4:])
try:
    with contextlib.ExitStack() as stack:
        joined = join_ranks(config, stack)
        if seen:  # as if each rank saw the GPU of one shard alone
            own = coordinates.ServedRank(*seen[joined.world.rank])
            coordinates._offered = lambda servers: [own]
        ready = prepare(bind(map_server(joined, lambda error: None)))
        loop = RankLoop(ready.trainer, Services(ready), ready.control, None)
        command = commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=samples(seed=number))
        reply = loop.execute(command)
        assert isinstance(reply, commands.StepDone), reply
        if save:
            reply = loop.execute(commands.SaveCheckpoint(id="c", name=save))
            assert isinstance(reply, commands.CheckpointDone), reply
        print(f"VERSION {ready.trainer.weight_version} of {ready.folder.name} on {ready.world.rank}.", flush=True)
except Exception as error:
    print(f"RAISED {type(error).__name__}: {error}", flush=True)
    raise
"""


@dataclass
class Server:
    """A served model in memory of this process. ``descriptors`` keep the memory."""

    base: Path
    name: str
    checkpoint: Path
    tp_size: int
    descriptors: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return instance_folder.instance_dir(self.name, self.base)

    def start(self, **changes: object) -> Server:
        """Load the checkpoint and publish; ``changes`` are to the manifest of the last rank."""
        me = processes.ProcessId.of(os.getpid())
        assert me is not None
        for manifest in read_instance(self.checkpoint / f"tp{self.tp_size}"):
            allocations = []
            for allocation in manifest.allocations:
                descriptor = os.memfd_create("served")
                os.ftruncate(descriptor, allocation.num_bytes)
                self.descriptors.append(descriptor)
                allocations.append(msgspec.structs.replace(allocation, handle=str(descriptor)))
            live = msgspec.structs.replace(
                manifest, instance_id=self.name, pid=me.pid, pid_start_ticks=me.start_ticks, parents=[], endpoints=False,
                pid_namespace=processes.pid_namespace(), model_path=str(self.checkpoint), allocations=allocations,
            )  # fmt: skip
            publish(msgspec.structs.replace(live, **changes) if changes else live, self.folder)
        self._load()
        return self

    def _load(self) -> None:
        for manifest, tensors in self._mapped():
            files = {t.name: t.file for t in manifest.checkpoint}
            for name, (shard, local) in tensors.items():
                with safe_open(self.checkpoint / files[name], framework="pt") as file:
                    tensor = file.get_tensor(name)
                for box, start in shard.boxes:
                    target = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
                    target.copy_(tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))])

    def _mapped(self) -> Iterator[tuple[Manifest, dict]]:
        manifests = read_instance(self.folder)
        for manifest in manifests:
            yield manifest, map_rank(manifests, manifest.tp_rank).tensors

    def weights(self) -> dict[tuple[int, str], torch.Tensor]:
        """Copies of what it serves, by tensor-parallel rank and name."""
        return {(m.tp_rank, name): local.clone() for m, found in self._mapped() for name, (_, local) in found.items()}

    def version(self) -> int:
        return json.loads((self.folder / "weights.json").read_bytes())["weight_version"]

    def stop(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        instance_folder.remove_instance(self.folder)


@dataclass
class Host:
    """A runtime folder with servers, and trainers of them."""

    base: Path
    checkpoint: Path
    stack: contextlib.ExitStack

    def serve(self, name: str, tp_size: int = 1, **changes: object) -> Server:
        server = Server(self.base / "rt", name, self.checkpoint, tp_size).start(**changes)
        self.stack.callback(server.stop)
        return server

    def train(
        self, num_ranks: int, *overrides: str, seen: object = None, number: int = 1, save: str = ""
    ) -> tuple[int, str]:
        """Exit status and output of ``num_ranks`` ranks that make one step."""
        script = self.base / "rank.py"
        script.write_text(RANK)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(script),
            json.dumps(seen), str(number), save, "service.http.port=0", "train.max_micro_batch_tokens=64",
            "train.max_sequence_tokens=64", "optim.rank=8", "optim.lr=1e-3", "optim.max_relative_update=1.0",
            "server.wait_seconds=5", f"server.runtime_dir='{self.base}/rt'", f"checkpoint.dir='{self.base}/checkpoints'",
            f"service.state_dir='{self.base}/state'", *overrides,
        ]  # fmt: skip
        root = Path(__file__).parents[3]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture
def host(checkpoints: Path, tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "rt").mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        yield Host(tmp_path, checkpoints / CASES[CASE].checkpoint, stack)


def _equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def test_two_servers_learn_together_and_a_new_one_is_filled(host: Host) -> None:
    """Two ranks beside two servers: equal bits, not those of before. One server starts again, with the weights on disk: the
    next trainer fills it, and goes on at the next version. Its own records say so too."""
    a, b = host.serve("a"), host.serve("b")
    before = a.weights()
    status, output = host.train(2, "server.replicas=2", save="first")
    assert status == 0, output
    assert sorted(re.findall(r"VERSION (\d) of (\w) on (\d)\.", output)) == [("1", "a", "0"), ("1", "b", "1")]
    trained = a.weights()
    assert _equal(trained, b.weights())
    assert not _equal(trained, before)
    b.stop()
    b = host.serve("b")
    assert _equal(b.weights(), before)
    status, output = host.train(2, "server.replicas=2", "server.instances=[b,a]", number=2)
    assert status == 0, output
    assert re.search(r"b on \S+ is filled with the weights of a on", output), output
    assert "optimizer state of" in output, output
    assert (a.version(), b.version()) == (2, 2)
    assert _equal(a.weights(), b.weights())
    assert not _equal(a.weights(), trained)


def test_ranks_stand_beside_the_shard_that_they_see(host: Host) -> None:
    """Two replicas of two ranks, started in an order that is not the servers'."""
    a, b = host.serve("a", 2), host.serve("b", 2)
    status, output = host.train(4, "server.replicas=2", seen=[("b", 0), ("a", 1), ("a", 0), ("b", 1)])
    assert status == 0, output
    assert sorted(re.findall(r"VERSION 1 of (\w) on (\d)\.", output)) == [
        ("a", "2"),
        ("a", "3"),
        ("b", "0"),
        ("b", "1"),
    ]
    assert _equal(a.weights(), b.weights())


@pytest.mark.parametrize(
    ("changes", "ranks", "overrides", "message"),
    [
        (
            {"max_model_len": 7},
            2,
            (),
            r"ManifestError: replicas: b tp rank 0 on \S+: longest request: got 7, expected \d+",
        ),
        ({}, 3, (), r"ConfigError: trainer ranks: got 3, expected 2, one for each shard of a \(TP 1\), b \(TP 1\)"),
        ({}, 2, ("server.instances=[a,c]",), r"NoServerError: waited .* for server c"),
        ({"dtype": "float16"}, 2, (), r"ManifestError: replicas: b tp rank 0 on \S+: dtype: got float16, expected"),
    ],
    ids=["options", "ranks", "names", "dtype"],
)
def test_what_does_not_fit_is_refused(host: Host, changes, ranks: int, overrides, message: str) -> None:
    """Before anything is written; each message names the replica and its host, or the number of ranks."""
    a = host.serve("a")
    host.serve("b", **changes)
    before = a.weights()
    status, output = host.train(ranks, "server.replicas=2", *overrides)
    assert status != 0
    assert re.search(f"RAISED {message}", output), output
    assert _equal(a.weights(), before)


def test_other_weights_are_refused(host: Host) -> None:
    """One bit of one tensor that is not among those compared with the folder."""
    host.serve("a")
    b = host.serve("b")
    _, tensors = next(b._mapped())
    name, (_, local) = next((n, t) for n, t in tensors.items() if n.endswith("norm.weight"))
    local.view(-1)[3] += 2.0**-10
    status, output = host.train(2, "server.replicas=2", "server.verify_tensors=0")
    assert status != 0
    assert re.search(
        rf"RAISED ReplicaError: replicas: got other bits than on a on \S+ in {re.escape(name)} on b on", output
    )
