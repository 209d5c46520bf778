"""What the rank loop calls besides the trainer: checkpoints, the update gate, the record of steps, the terminal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from apollo_tp.checkpoint import read_info
from apollo_tp.checkpoint.behind import ROOM_SHARE, WriteBehind, Written, host_room
from apollo_tp.checkpoint.card import Trained
from apollo_tp.checkpoint.folder import optimizer_folder
from apollo_tp.checkpoint.host_snapshot import HostSnapshots
from apollo_tp.checkpoint.lineage import Lineage
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.distributed.tp_group import compute_group
from apollo_tp.gpu_sharing import mps
from apollo_tp.launch.progress import StepProgress
from apollo_tp.launch.restoring import Target, folder_of, put_back, restore
from apollo_tp.launch.stages import Ready, before_restore
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import served_models
from apollo_tp.wire import commands

WRITE_PATIENCE = 10
"""The threads that write a checkpoint wait for each other for this many times the deadline of a collective."""


class Services:
    """training.rank_loop.Services of one rank. The lineage file records steps and checkpoints; rank 0 shows progress."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self._lineage, self._gate, self._trainer = ready.lineage, ready.gate, ready.trainer
        self._progress = StepProgress() if ready.world.rank == 0 else None
        config, mapped = ready.config, ready.mapped
        self._root = Path(config.checkpoint.dir).resolve()
        self._writer = CheckpointWriter(
            self._root,
            mapped.manifest.model_path,
            mapped.manifest.checkpoint,
            mapped.stored,
            ready.mesh,
            keep=config.checkpoint.keep,
            save_config=ready.hf_config.save_pretrained,
            trained=lambda: self._lineage.record.trained,
            served=lambda: served_models(instance_folder.base_dir(config.server.runtime_dir)),
        )
        self.is_saving, seconds = False, WRITE_PATIENCE * config.command_timeout_seconds
        self._snapshots: HostSnapshots | None = None
        self._behind: WriteBehind | None = None
        if config.checkpoint.behind:
            keep = config.checkpoint.keep_memory
            self._behind = WriteBehind(self._writer, ready.world.store, seconds, keep_memory=keep)

    def form_group(self) -> None:
        """Form the compute group of all ranks again. Collective."""
        ready = self._ready
        ready.alarm.next_epoch()
        compute_group(ready.mesh.world, ready.mapped.device, ready.config.command_timeout_seconds)

    def save_checkpoint(self, name: str, kept: Sequence[str] = ()) -> tuple[str, int] | None:
        """Write checkpoint ``name``; returns its folder and its size in bytes, or None if it is written while training goes
        on. Those that are ``kept`` are not removed for it. Collective."""
        trainer = self._trainer
        if self._behind and self._behind.begin(name, trainer.optimizer, trainer.weight_version, kept):
            self.is_saving = True
            return None
        path, num_bytes = self._writer.save(name, trainer.optimizer, trainer.weight_version, kept)
        self._lineage.update(weight_version=trainer.weight_version, checkpoint=str(path))
        return str(path), num_bytes

    def written_checkpoint(self) -> Written | None:
        """On rank 0: what became of the checkpoint that was written while training went on, once it is known."""
        return self._behind.written if self._behind and self.is_saving else None

    def checkpoint_written(self, path: str) -> None:
        """It is complete at ``path``, or has failed ("")."""
        self.is_saving = False
        if path:
            self._lineage.update(checkpoint=path)

    def keep_snapshot(self, name: str) -> tuple[str, int] | None:
        """Keep weights and optimizer state as ``name`` in host memory; returns the folder of the checkpoint that stands in
        for it once it is lost, and the bytes. None on all ranks, which do nothing, where that cannot be. Collective."""
        if not self._ready.config.checkpoint.guard_in_memory:
            return None
        if self._snapshots is None:
            weights = [local for _, local in self._ready.mapped.tensors.values()]
            self._snapshots = HostSnapshots(weights, self._trainer.optimizer)
        snapshots, fallback = self._snapshots, Path(self._lineage.record.checkpoint)
        is_there = (
            fallback.parent == self._root and read_info(fallback) is not None and optimizer_folder(fallback).is_dir()
        )
        no_room = snapshots.more_bytes * self._writer.num_ranks > ROOM_SHARE * host_room()
        if self._writer.any_rank(no_room or not is_there):
            return None
        snapshots.take(name, fallback, self._lineage.record.trained)
        return str(fallback), snapshots.num_bytes * self._writer.num_ranks

    def restore_checkpoint(self, name: str, restore_id: str, fallback: str = "") -> str:
        """Put checkpoint ``name`` into the served memory and the optimizer; returns its folder. With ``fallback`` the
        snapshot in host memory ("" is returned), or if it is not there that checkpoint. Collective."""
        ready, trainer = self._ready, self._trainer
        target = Target(
            ready.mapped, ready.mesh, self._lineage, functools.partial(before_restore, self._lineage, self._gate)
        )
        snapshots = self._snapshots
        lost = bool(fallback) and self._writer.any_rank(snapshots is None or snapshots.name != name)
        with target.control().agree():
            folder = folder_of(self._root, fallback or name)
        if fallback and not lost and snapshots is not None:
            put_back(target, trainer.optimizer, snapshots, restore_id, trainer.weight_version)
        else:
            identity = restore_id + commands.LOST * lost
            restore(target, trainer.optimizer, folder, identity, trainer.weight_version)
        trainer.weights_replaced()
        return str(folder) if lost or not fallback else ""

    @property
    def is_torn(self) -> bool:
        """Whether a restore has begun to write, and has not ended."""
        return bool(self._lineage.record.restoring)

    def finish_command(self, weight_version: int) -> float:
        """Resume the server if it was paused; returns for how many seconds it was."""
        return self._gate.after_step(weight_version)

    def record_step(self, command: commands.AnyStep, figures: commands.StepFigures) -> None:
        """Remember a completed step as the last one."""
        self._lineage.update(
            trained=_added(self._lineage.record, command, figures),
            weight_version=figures.weight_version,
            step_count=self._trainer.optimizer.step_count,
            last_job_id=command.job_id,
            last_job_step=command.job_step,
        )
        if self._progress:
            self._progress(command, figures)

    def record_failure(self, weight_version: int) -> None:
        """Record the weight version after a failed step, which may have written weights."""
        self._lineage.count_to(weight_version)

    def hello(self, command_id: str = "") -> commands.Hello:
        """What is being trained, with the limits of requests, and the last completed step."""
        ready, config, trainer, last = self._ready, self._ready.config, self._trainer, self._lineage.record
        first, limit = ready.manifests[0], config.train.max_sequence_tokens
        return commands.Hello(
            id=command_id,
            protocol_version=commands.PROTOCOL_VERSION,
            instance_id=first.instance_id,
            server_life=last.life or first.life,
            model_path=first.model_path,
            served_model_names=first.served_model_names,
            num_ranks=ready.world.size,
            vocab_size=ready.model.module.config.get_text_config().vocab_size,
            max_sequence_tokens=min(limit, first.max_model_len) if first.max_model_len else limit,
            weight_version=trainer.weight_version,
            num_parameters=sum(torch.Size(shape).numel() for shape in self._global_shapes().values()),
            optimizer=trainer.optimizer.describe(),
            gradients=trainer.gradients.value,
            sync=config.sync.mode.value,
            cache=config.sync.cache.value,
            memory=ready.memory,
            qos=mps.describe(config.qos, trainer.device),
            attention_window=ready.model.attention_window,
            layout=self._layout(),
            last_job_id=last.last_job_id,
            last_job_step=last.last_job_step,
            last_restore_id=last.restore_id,
            replicas=list(map(commands.Replica, ready.arrangement.instances, ready.arrangement.hosts)),
            num_replicas=config.server.replicas,
        )

    def close(self) -> None:
        if self._progress:
            self._progress.close()

    def _global_shapes(self) -> dict[str, tuple[int, ...]]:
        return {p.name: p.shard.global_shape for p in self._ready.model.parameters}

    def _layout(self) -> list[dict[str, str | int | list[int]]]:
        """A row per part of a checkpoint tensor that a rank of the server has, for the page's layout view."""
        return [
            {
                "checkpoint": segment.checkpoint,
                "rank": manifest.tp_rank,
                "served": segment.served,
                "offset": segment.box_offset,
                "shape": segment.box_shape,
            }
            for manifest in self._ready.manifests
            for segment in manifest.segments
        ]


def _added(record: Lineage, command: commands.AnyStep, figures: commands.StepFigures) -> Trained:
    """What the weights were trained on, with this step; one that was skipped counts as nothing."""
    before = record.trained
    if figures.skipped:
        return before
    match command:
        case commands.Step():
            num_samples = len(command.samples)
        case commands.PreferenceStep():
            num_samples = len(command.pairs)
        case commands.OptimizerStep():
            num_samples = command.num_samples
    return Trained(
        jobs=before.jobs + (command.job_id != record.last_job_id),
        steps=before.steps + 1,
        samples=before.samples + num_samples,
        tokens=before.tokens + figures.num_tokens,
        loss_tokens=before.loss_tokens + figures.num_loss_tokens,
        loss=figures.loss,
    )
