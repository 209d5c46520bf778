"""Servers without vLLM, whose memory this process holds, and trainers of them that torchrun starts.

A host is a runtime folder. Where there are several, ranks are told on which machine they are.
"""

from __future__ import annotations

import contextlib
import json
import os
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
from tests.support import forks
from tests.support.processes import FORKING_TORCHRUN


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
        command = [
            "--standalone", "--nproc-per-node", str(num_ranks), "-m", "tests.support.memory_rank",
            json.dumps(seen), json.dumps(machines), str(number), save,
            "service.http.port=0", "train.max_micro_batch_tokens=64",
            "train.max_sequence_tokens=64", "optim.rank=8", "optim.lr=1e-3", "optim.max_relative_update=1.0",
            "server.wait_seconds=2", f"server.runtime_dir='{self.base}/rt'", f"checkpoint.dir='{self.base}/checkpoints'",
            "checkpoint.behind=false",
            f"service.state_dir='{self.base}/state'", *overrides,
        ]  # fmt: skip
        done = forks.run(FORKING_TORCHRUN, [FORKING_TORCHRUN, *command], 200)
        return done.returncode, done.stdout + done.stderr


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())
