"""Checkpoints that are written while training goes on: of the weights of the moment they were asked for, all or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apollo_tp.checkpoint import behind, optimizer_state, read_info, restore
from apollo_tp.checkpoint.behind import WriteBehind
from apollo_tp.checkpoint.folder import optimizer_folder
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from tests.support.families import CASES
from tests.support.optim_model import same, snapshot
from tests.support.ranks import run_ranks
from tests.support.restores import Served
from tests.support.trainers import CASE, make_trainer


def _behind(tp: TPGroup, served: Served) -> WriteBehind:
    manifest = served.mapped.manifest
    writer = CheckpointWriter(
        served.root, manifest.model_path, manifest.checkpoint, served.mapped.stored, served.mesh, keep=9,
        save_config=lambda folder: None,
    )  # fmt: skip
    store = dist.FileStore(str(served.root.with_name("store")), tp.size) if tp.size > 1 else None
    return WriteBehind(writer, store, 60.0)


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _go_on(tp: TPGroup, tp_size: int, checkpoint: Path, root: Path) -> bool:
    """Two steps, a checkpoint whose disk is slow, two steps meanwhile; the checkpoint is that of before these."""
    mesh = Mesh.build(tp, tp_size)
    served = Served(mesh, checkpoint, root, root.with_name(f"rt{tp.rank // tp_size}"))
    for seed in range(2):
        served.step(seed)
    weights, state = served.weights(), snapshot(served.trainer.optimizer)
    trained, fast = threading.Event(), CheckpointWriter.write_boxes

    def slow(self: CheckpointWriter, *arguments: object) -> dict[str, int]:
        assert trained.wait(60)
        return fast(self, *arguments)  # type: ignore[arg-type]

    CheckpointWriter.write_boxes = slow  # type: ignore[method-assign]
    writing = _behind(tp, served)
    assert writing.begin("first", served.trainer.optimizer, 2)
    for seed in range(2, 4):
        served.step(seed)
    assert not (root / "first").exists()
    assert writing.written is None
    trained.set()
    writing.join()
    if tp.rank == 0:
        assert writing.written is not None
        assert (writing.written.error, writing.written.path, writing.written.weight_version) == ("", root / "first", 2)
        assert writing.written.num_bytes > 0
    tp.all_reduce_(torch.zeros(1))
    info = read_info(root / "first")
    assert info is not None
    assert (info.weight_version, info.num_ranks) == (2, tp.size)
    fresh, tensors = make_trainer(mesh.tp, checkpoint, mesh=mesh)
    putting = restore.Restore(root / "first", str(checkpoint), served.mapped.manifest.checkpoint, tensors, mesh)
    putting.check(fresh.optimizer)
    putting.write()
    optimizer_state.load(fresh.optimizer, optimizer_folder(root / "first"))
    # of the counters, norms of the weights are measured anew
    assert same(state, snapshot(fresh.optimizer))
    return all(torch.equal(weights[name], local) for name, (_, local) in tensors.items())


@pytest.mark.parametrize(("size", "tp_size"), [(1, 1), (2, 2), (2, 1)], ids=["one", "two", "replicas"])
def test_steps_are_made_while_a_checkpoint_is_written(
    size: int, tp_size: int, checkpoints: Path, tmp_path: Path
) -> None:
    assert all(run_ranks(_go_on, size, tp_size, checkpoints / CASES[CASE].checkpoint, tmp_path / "checkpoints"))


def _fail(tp: TPGroup, checkpoint: Path, root: Path) -> list[str]:
    """Errors of rank 0's result: a disk without room on the last rank, a name that is taken, none; and of a host without
    room for the copies."""
    served = Served(Mesh.single(tp), checkpoint, root, root.with_name("rt"))
    writing, sound, found = _behind(tp, served), CheckpointWriter.write_boxes, []

    def full(self: CheckpointWriter, *arguments: object) -> dict[str, int]:
        if self.rank == tp.size - 1:
            raise OSError(28, "No space left on device")
        return sound(self, *arguments)  # type: ignore[arg-type]

    for name, write in (("first", full), ("second", sound), ("second", sound)):
        CheckpointWriter.write_boxes = write  # type: ignore[method-assign]
        assert writing.begin(name, served.trainer.optimizer, 0)
        writing.join()
        found.append(writing.written.error if writing.written else "")
        tp.all_reduce_(torch.zeros(1))
        if tp.rank == 0:
            writing._store.delete_key("checkpoint/second/ready")
            writing._store.delete_key("checkpoint/second/1")
        tp.all_reduce_(torch.zeros(1))
    behind.host_room = lambda: 1000.0 if tp.rank == tp.size - 1 else 1e12
    assert not _behind(tp, served).begin("third", served.trainer.optimizer, 0)
    kept = writing._memory.num_bytes
    assert writing.begin("third", served.trainer.optimizer, 0)  # in the memory that was kept
    writing.join()
    assert writing._memory.num_bytes == kept
    return found


def test_errors_of_any_rank_are_the_result_and_leave_nothing(checkpoints: Path, tmp_path: Path) -> None:
    """A checkpoint after it is written. Where one host has no room for the copies, no rank makes any, but for copies in
    memory that was kept."""
    root = tmp_path / "checkpoints"
    full, good, taken = run_ranks(_fail, 2, checkpoints / CASES[CASE].checkpoint, root)[0]
    assert full.startswith("CheckpointError: rank 1: checkpoint.dir"), full
    assert "bytes free (No space left on device), expected about" in full
    assert good == ""
    assert "got a name that is taken" in taken
    assert sorted(path.name for path in root.iterdir()) == [
        "latest", "second", "second.optimizer", "third", "third.optimizer"
    ]  # fmt: skip
