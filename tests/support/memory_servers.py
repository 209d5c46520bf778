"""Servers without vLLM, whose memory this process holds, and trainers of them that torchrun starts.

A host is a runtime folder. Where there are several, ranks are told on which machine they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open

from apollo_tp.checkpoint.lineage import RECORD_BYTES
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.manifest import Manifest, publish
from apollo_tp.shards.mapping import map_rank

RANK = """
import contextlib, json, logging, os, socket, sys, msgspec
logging.basicConfig(level=logging.INFO)
from apollo_tp.launch import coordinates
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.launch.services import Services
from apollo_tp.launch.session import await_server
from apollo_tp.launch.stages import bind, join_ranks, map_server, prepare, take_place
from apollo_tp.runtime import processes
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import commands
from apollo_tp.inspect.exactness import samples

seen, machines, number, save = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = read_arguments(sys.argv[5:])
if machines:  # as if it ran on that one, with a runtime folder and a name of its own
    machine = machines[int(os.environ["RANK"])]
    processes.machine = lambda: f"machine {machine}"
    socket.gethostname = lambda: f"host-{machine}"
    config.server.runtime_dir += f"-{machine}"
try:
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
        command = commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=samples(seed=number))
        reply = loop.execute(command)
        assert isinstance(reply, commands.StepDone), reply
        if save:
            reply = loop.execute(commands.SaveCheckpoint(id="c", name=save))
            assert isinstance(reply, commands.CheckpointDone), reply
        print(f"PEERS {ready.mesh.tp.peers.enabled}.", flush=True)
        print(f"VERSION {ready.trainer.weight_version} of {ready.folder.name} on {ready.world.rank}.", flush=True)
except Exception as error:
    print(f"RAISED {type(error).__name__}: {error}", flush=True)
    raise
"""


@dataclass
class Server:
    """A served model in memory of this process, its ranks spread over hosts. ``descriptors`` keep the memory."""

    bases: Sequence[Path]
    """The hosts' runtime folders."""
    name: str
    checkpoint: Path
    tp_size: int
    descriptors: list[int] = field(default_factory=list)

    @property
    def folders(self) -> list[Path]:
        return [instance_folder.instance_dir(self.name, base) for base in self.bases]

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
                num_nodes=len(self.bases),
            )  # fmt: skip
            folder = self.folders[live.tp_rank // len(live.ranks_here)]
            publish(msgspec.structs.replace(live, **changes) if changes else live, folder)
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
        manifests = [manifest for folder in self.folders for manifest in read_instance(folder)]
        for manifest in manifests:
            yield manifest, map_rank(manifests, manifest.tp_rank).tensors

    def weights(self) -> dict[tuple[int, str], torch.Tensor]:
        """Copies of what it serves, by tensor-parallel rank and name."""
        return {(m.tp_rank, name): local.clone() for m, found in self._mapped() for name, (_, local) in found.items()}

    def version(self) -> int:
        return self.record()["weight_version"]

    def record(self) -> dict:
        """How its weights have changed, the same on all its hosts."""
        first, *others = [json.loads((folder / "weights.json").read_bytes()) for folder in self.folders]
        assert all(other["weight_version"] == first["weight_version"] for other in others)
        return first

    def change_record(self, **changes: object) -> None:
        for folder in self.folders:
            (folder / "weights.json").write_text(json.dumps(self.record() | changes).ljust(RECORD_BYTES))

    def stop(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        for folder in self.folders:
            instance_folder.remove_instance(folder)


@dataclass
class Host:
    """A runtime folder with servers, one for each of ``machines`` if there are any, and trainers of them."""

    base: Path
    checkpoint: Path
    stack: contextlib.ExitStack

    def serve(self, name: str, tp_size: int = 1, *, on: Sequence[str] = (), **changes: object) -> Server:
        """A server on this host, or on these machines."""
        bases = [self.base / f"rt-{machine}" for machine in on] or [self.base / "rt"]
        for base in bases:
            base.mkdir(mode=0o700, exist_ok=True)
        server = Server(bases, name, self.checkpoint, tp_size).start(**changes)
        self.stack.callback(server.stop)
        return server

    def train(
        self,
        num_ranks: int,
        *overrides: str,
        seen: object = None,
        machines: object = None,
        number: int = 1,
        save: str = "",
    ) -> tuple[int, str]:
        """Exit status and output of ``num_ranks`` ranks that make one step, beside the shards that each has ``seen``, on
        these ``machines``."""
        script = self.base / "rank.py"
        script.write_text(RANK)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(script),
            json.dumps(seen), json.dumps(machines), str(number), save,
            "service.http.port=0", "train.max_micro_batch_tokens=64",
            "train.max_sequence_tokens=64", "optim.rank=8", "optim.lr=1e-3", "optim.max_relative_update=1.0",
            "server.wait_seconds=5", f"server.runtime_dir='{self.base}/rt'", f"checkpoint.dir='{self.base}/checkpoints'",
            "checkpoint.behind=false",
            f"service.state_dir='{self.base}/state'", *overrides,
        ]  # fmt: skip
        root = Path(__file__).parents[2]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())
