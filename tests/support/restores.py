"""What a trainer over memory of this process writes checkpoints with, and puts them back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from apollo_tp.checkpoint.lineage import LineageFile
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.inspect.exactness import local_part, map_copy, samples
from apollo_tp.launch.restoring import Target
from apollo_tp.shards.mapping import MappedRank
from apollo_tp.training.trainer import Trainer
from tests.support.trainers import make_trainer


class Served:
    """A trainer of one rank over memory of this process, with what restores need. ``folder`` is that of its server."""

    def __init__(self, mesh: Mesh, checkpoint: Path, root: Path, folder: Path) -> None:
        self.mesh, self.root, self.folder = mesh, root, folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.trainer: Trainer
        self.trainer, tensors = make_trainer(mesh.tp, checkpoint, mesh=mesh)
        self.mapped: MappedRank = replace(map_copy(checkpoint, mesh.tp), tensors=tensors)
        self.start_again()

    def start_again(self) -> None:
        """The record as the next trainer reads it."""
        self.lineage = LineageFile(self.folder, self.mapped.manifest.model_path, keep=self.mesh.tp.rank == 0)
        self.target = Target(self.mapped, self.mesh, self.lineage, self.lineage.before_write)

    def step(self, seed: int) -> None:
        self.lineage.before_write()
        assert self.trainer.step(samples(seed=seed)).skipped == ""
        count = self.trainer.optimizer.step_count
        self.lineage.update(weight_version=self.trainer.weight_version, step_count=count)

    def save(self, name: str, keep: int = 9) -> Path:
        manifest = self.mapped.manifest
        writer = CheckpointWriter(
            self.root, manifest.model_path, manifest.checkpoint, self.mapped.stored, self.mesh, keep=keep,
            save_config=lambda folder: None,
        )  # fmt: skip
        path, _ = writer.save(name, self.trainer.optimizer, self.trainer.weight_version)
        return path

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: local.clone() for name, (_, local) in self.mapped.tensors.items()}

    def differing(self, folder: Path) -> list[str]:
        """The tensors whose bits are not those of the checkpoint in ``folder``."""
        found = []
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                    if name in self.mapped.tensors:
                        shard, local = self.mapped.tensors[name]
                        if not torch.equal(local_part(file.get_tensor(name), shard), local):
                            found.append(name)
        return found
