"""A guard's snapshot in host memory goes back as a checkpoint would; if it is lost, the one that stands in for it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apollo_tp.checkpoint.card import Trained
from apollo_tp.checkpoint.host_snapshot import HostSnapshots
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import RankFailedError
from apollo_tp.launch import restoring
from tests.support.families import CASES
from tests.support.optim_model import same, snapshot
from tests.support.ranks import run_ranks
from tests.support.restores import Served
from tests.support.trainers import CASE


def _served(world: TPGroup, tp_size: int, checkpoint: Path, root: Path) -> tuple[Served, Path, HostSnapshots]:
    """A trainer that has a checkpoint of one step and, after a second step, a snapshot."""
    mesh = Mesh.build(world, tp_size)
    served = Served(mesh, checkpoint, root, root.with_name(f"rt-{world.size}-{world.rank // tp_size}"))
    served.step(0)
    folder = served.save(f"older-{world.size}")
    served.step(1)
    held = HostSnapshots([local for _, local in served.mapped.tensors.values()], served.trainer.optimizer)
    held.take("held", folder, Trained())
    return served, folder, held


def _put_back(world: TPGroup, tp_size: int, checkpoint: Path, root: Path) -> list[bool]:
    """Two steps after the snapshot are undone, twice; the step after it is the one that followed it, bit for bit."""
    served, folder, held = _served(world, tp_size, checkpoint, root)
    weights, state = served.weights(), snapshot(served.trainer.optimizer)
    served.step(2)
    after = snapshot(served.trainer.optimizer)
    served.step(3)
    found = []
    for number in range(2):
        assert not same(state, snapshot(served.trainer.optimizer))
        version = served.trainer.weight_version
        restoring.put_back(served.target, served.trainer.optimizer, held, f"r{number}", version)
        served.trainer.weights_replaced()
        found += [all(torch.equal(local, weights[name]) for name, local in served.weights().items())]
        found += [same(state, snapshot(served.trainer.optimizer))]
        record = served.lineage.record
        assert (record.restoring, record.restore_id, record.checkpoint) == ("", f"r{number}", str(folder))
        assert (record.weight_version, record.step_count) == (version + 1, 2)
        served.step(2)
        found += [same(after, snapshot(served.trainer.optimizer))]
    return found


@pytest.mark.parametrize(("size", "tp_size"), [(1, 1), (2, 2), (2, 1)], ids=["one", "two", "replicas"])
def test_a_snapshot_goes_back(size: int, tp_size: int, checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints / CASES[CASE].checkpoint
    assert run_ranks(_put_back, size, tp_size, checkpoint, tmp_path / "checkpoints") == [[True] * 6] * size


def _interrupt(world: TPGroup, checkpoint: Path, root: Path) -> list[bool]:
    """The last rank raises before it writes its part, as if it were killed; the next trainer has no snapshot."""
    served, folder, held = _served(world, world.size, checkpoint, root)
    served.step(2)
    if world.rank == world.size - 1:
        held.put_back = lambda: (_ for _ in ()).throw(OSError("injected"))  # type: ignore[method-assign]
    with pytest.raises((OSError, RankFailedError)):
        restoring.put_back(served.target, served.trainer.optimizer, held, "r1", 3)
    assert (served.lineage.record.restoring, served.lineage.record.restore_id) == (str(folder), "")
    world.all_reduce_(torch.zeros(1))
    served.start_again()
    before = len(served.differing(folder))
    completed = restoring.complete_restore(served.target)
    record = served.lineage.record
    assert (record.restoring, record.weight_version, record.restore_id, record.step_count) == ("", 4, "", 1)
    return [completed, before > 0, served.differing(folder) == []]


def test_what_broke_off_is_completed_with_the_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    """The record says so from before the first write; the request is not noted as done, so that it is answered for."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    assert run_ranks(_interrupt, 2, checkpoint, tmp_path / "checkpoints") == [[True] * 3] * 2
