"""Replace the served weights by those of a checkpoint, on all ranks or none; and complete what a killed trainer began.

The record of the served weights names the checkpoint from before the first write until all ranks have written. What a kill
or an error leaves in between is completed by the next trainer, before anything else.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from apollo_tp.checkpoint import read_info
from apollo_tp.checkpoint.folder import OPTIMIZER_DIR, CheckpointInfo, optimizer_folder, origin_of, partial_path
from apollo_tp.checkpoint.host_snapshot import HostSnapshots
from apollo_tp.checkpoint.lineage import Lineage, LineageFile
from apollo_tp.checkpoint.restore import Restore
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.errors import CheckpointError, RankFailedError
from apollo_tp.optim import Optimizer
from apollo_tp.shards.mapping import MappedRank

log = logging.getLogger("apollo_tp")


@dataclass(frozen=True)
class Target:
    """What a restore writes, on this rank. ``before_write`` pauses the server if the mode says so; it is collective."""

    mapped: MappedRank
    mesh: Mesh
    lineage: LineageFile
    before_write: Callable[[], None]

    def control(self) -> ComputeControl:
        """All ranks of all replicas."""
        return ComputeControl(self.mesh.world, self.mapped.device)

    def of(self, folder: Path) -> Restore:
        manifest = self.mapped.manifest
        tensors = self.mapped.tensors
        return Restore(folder, origin_of(manifest.model_path), manifest.checkpoint, tensors, self.mesh)


def restore(target: Target, optimizer: Optimizer, folder: Path, restore_id: str, weight_version: int) -> None:
    """Put the checkpoint in ``folder`` into the served memory and the optimizer; ``weight_version`` is that of the weights
    that it replaces. Collective.

    Raises CheckpointError or RankFailedError: before the first write if the checkpoint cannot be restored, and then nothing
    has changed; what is raised later leaves ``lineage.record.restoring`` set, and this process must end.
    """
    from apollo_tp.checkpoint import optimizer_state  # takes a second to import

    checkpoint, lineage, control = target.of(folder), target.lineage, target.control()
    info = checkpoint.check(optimizer)
    target.before_write()
    before = lineage.record
    try:
        with control.agree():
            lineage.update(restoring=str(folder), restore_id=restore_id)
    except (OSError, RankFailedError):  # all ranks have heard of it, so none writes
        lineage.update(restoring="", restore_id=before.restore_id)
        raise
    checkpoint.write()
    with control.agree():
        optimizer_state.load(optimizer, optimizer_folder(folder))
    optimizer.measure_weights()
    _completed(lineage, lineage.record, info, folder, weight_version, optimizer.step_count)
    log.info("%s restored, as weight version %d", folder, weight_version + 1)


def put_back(
    target: Target, optimizer: Optimizer, snapshot: HostSnapshots, restore_id: str, weight_version: int
) -> None:
    """``restore`` of a snapshot in host memory. What a kill leaves in between is completed with its ``fallback``: the record
    names that one, and has no ``restore_id`` before all is written. Collective; raises as ``restore``."""
    lineage, control = target.lineage, target.control()
    target.before_write()
    try:
        with control.agree():
            lineage.update(restoring=str(snapshot.fallback))
    except (OSError, RankFailedError):  # all ranks have heard of it, so none writes
        lineage.update(restoring="")
        raise
    with control.agree():
        snapshot.put_back()
    optimizer.measure_weights()
    lineage.update(
        restoring="",
        restore_id=restore_id,
        checkpoint=str(snapshot.fallback),
        weight_version=weight_version + 1,
        step_count=optimizer.step_count,
        trained=snapshot.trained,
    )
    log.info("the snapshot %s was put back, as weight version %d", snapshot.name, weight_version + 1)


def complete_restore(target: Target) -> bool:
    """Write the checkpoint that an earlier trainer was writing when it ended, if there is one. Returns whether there was.
    Collective; the optimizer's state is loaded as at every start. Raises CheckpointError on all ranks if it is gone."""
    lineage, started = target.lineage, time.monotonic()
    rows = target.control().gather(msgspec.json.encode((lineage.trained_here, lineage.record)))
    records = [msgspec.json.decode(row, type=tuple[bool, Lineage]) for row in rows]
    trained = [record for trained_here, record in records if trained_here]
    version = max((record.weight_version for record in trained), default=0)
    newest = [record for record in trained if record.weight_version == version]
    open_one = next((record for record in newest if record.restoring), None)
    if open_one is None:  # a replica that was away while others completed it is filled from these
        return False
    folder = Path(open_one.restoring)
    log.warning("the last trainer ended while it restored %s: that is completed first", folder)
    checkpoint = target.of(folder)
    with _advice(folder):
        info = checkpoint.check(None)
        with target.control().agree():
            from apollo_tp.checkpoint import optimizer_state

            state = optimizer_folder(folder)
            step_count = optimizer_state.step_count(state) if state.is_dir() else 0
    target.before_write()
    with target.control().agree():
        lineage.update(restoring=str(folder))
    checkpoint.write()
    _completed(lineage, open_one, info, folder, version, step_count)
    log.info("%s restored in %.1f s", folder, time.monotonic() - started)
    return True


def _completed(
    lineage: LineageFile, base: Lineage, info: CheckpointInfo, folder: Path, weight_version: int, step_count: int
) -> None:
    changed = msgspec.structs.replace(
        base,
        restoring="",
        checkpoint=str(folder),
        weight_version=weight_version + 1,
        step_count=step_count,
        trained=info.trained,
    )
    lineage.update(**msgspec.structs.asdict(changed))


@contextlib.contextmanager
def _advice(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. The served memory has a part of {folder}: put the folder back and start the trainer again, or start "
            "the server again"
        ) from error


def folder_of(root: Path, name: str) -> Path:
    """The folder of the checkpoint ``name`` below ``root``. Raises CheckpointError if that is no name of a checkpoint."""
    partial_path(root, name)
    folder = root / name
    if read_info(folder) is None:
        raise CheckpointError(
            f"checkpoint {folder}: got no such checkpoint, expected one that was written below checkpoint.dir and is kept; "
            "see GET /checkpoints"
        )
    if not optimizer_folder(folder).is_dir():
        raise CheckpointError(
            f"checkpoint {folder}: got no optimizer state in {optimizer_folder(folder)} or {folder / OPTIMIZER_DIR}, "
            "expected it there; put the folder back"
        )
    return folder
