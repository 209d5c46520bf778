"""A checkpoint goes back into the served memory and the optimizer, at any number of ranks: all of it or nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apollo_tp.checkpoint import optimizer_state, restore
from apollo_tp.checkpoint.folder import CHECKSUMS_FILE, INFO_FILE, optimizer_folder
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CheckpointError, RankFailedError
from apollo_tp.launch import restoring
from tests.support.families import CASES
from tests.support.optim_model import same, snapshot
from tests.support.ranks import run_ranks, start_origins
from tests.support.restores import Served
from tests.support.trainers import CASE, make_trainer


@pytest.fixture(scope="module", autouse=True)
def origins() -> None:
    """Four ranks import at once: a rank waits a minute for the others, no longer."""
    start_origins(4)


def _served(world: TPGroup, tp_size: int, checkpoint: Path, root: Path) -> Served:
    mesh = Mesh.build(world, tp_size)
    replica = world.rank // tp_size
    return Served(mesh, checkpoint, root, root.with_name(f"rt-{world.size}-{tp_size}-{replica}"))


def _save_and_go_on(world: TPGroup, tp_size: int, checkpoint: Path, root: Path) -> bool:
    """Two steps, a checkpoint, a third step; the checkpoint, and the third step once more: the same bits."""
    served = _served(world, tp_size, checkpoint, root)
    for seed in range(2):
        served.step(seed)
    folder = served.save(f"at-{world.size}-{tp_size}")
    at_save = snapshot(served.trainer.optimizer)
    served.step(2)
    after = served.weights(), snapshot(served.trainer.optimizer)
    served.step(3)
    restoring.restore(served.target, served.trainer.optimizer, folder, "r1", served.trainer.weight_version)
    served.trainer.weights_replaced()
    assert served.differing(folder) == []
    assert same(at_save, snapshot(served.trainer.optimizer))
    record = served.lineage.record
    assert (record.restoring, record.restore_id, record.checkpoint) == ("", "r1", str(folder))
    assert (record.weight_version, record.step_count, served.trainer.weight_version) == (5, 2, 5)
    served.step(2)
    assert same(after[1], snapshot(served.trainer.optimizer))
    return all(torch.equal(local, after[0][name]) for name, local in served.weights().items())


def _restore_from_elsewhere(world: TPGroup, tp_size: int, checkpoint: Path, root: Path, names: list[str]) -> bool:
    """Restore what other numbers of ranks have written, each over weights and state that have gone on."""
    served = _served(world, tp_size, checkpoint, root)
    fresh, _ = make_trainer(served.mesh.tp, checkpoint, mesh=served.mesh)
    for number, name in enumerate(names):
        served.step(5 + number)
        assert len(served.differing(root / name)) > 5
        restoring.restore(served.target, served.trainer.optimizer, root / name, name, 3)
        assert served.differing(root / name) == []
        for weight, loaded in zip(fresh.optimizer.weights, served.trainer.optimizer.weights, strict=True):
            weight.data.copy_(loaded.data)
        optimizer_state.load(fresh.optimizer, optimizer_folder(root / name))
        assert same(snapshot(fresh.optimizer), snapshot(served.trainer.optimizer))
        if served.trainer.optimizer.owners is not None:
            served.trainer.optimizer.owners.check_equal()
    return True


SHAPES = [(1, 1), (2, 2), (4, 4), (4, 2)]
"""World size and TP size: the last one has two replicas."""


def test_a_checkpoint_goes_back_at_any_number_of_ranks(checkpoints: Path, tmp_path: Path) -> None:
    """Bits of weights and optimizer state; the step after it is the step that followed the checkpoint. Written and restored
    at 1, 2 and 4 ranks and by two replicas, each by each."""
    checkpoint, root = checkpoints / CASES[CASE].checkpoint, tmp_path / "checkpoints"
    for size, tp_size in SHAPES:
        assert all(run_ranks(_save_and_go_on, size, tp_size, checkpoint, root))
    for size, tp_size in SHAPES:
        others = [f"at-{other}-{other_tp}" for other, other_tp in SHAPES if (other, other_tp) != (size, tp_size)]
        assert all(run_ranks(_restore_from_elsewhere, size, tp_size, checkpoint, root, others))


def _flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place, 2 if place < 0 else 0)
        (byte,) = file.read(1)
        file.seek(place, 2 if place < 0 else 0)
        file.write(bytes([byte ^ 1]))


def _change_info(folder: Path, **changes: object) -> None:
    info = json.loads((folder / INFO_FILE).read_text())
    (folder / INFO_FILE).write_text(json.dumps(info | changes))


def _cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)


def _rename(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"layers.0.mlp.up_proj", b"layers.0.mlp.up_prox"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a weight": (lambda f: _flip(f / "model.safetensors", -1), "another checksum than it was written with"),
    "a bit of the state": (
        lambda f: _flip(next(optimizer_folder(f).glob("rank-00001*/*.safetensors")), -1),
        "optimizer state in .* another checksum",
    ),
    "a short file": (
        lambda f: _cut(f / "model.safetensors"),
        "model.safetensors: .*expected a complete safetensors file",
    ),
    "no tensor": (lambda f: _rename(f / "model.safetensors"), r"no model.layers.0.mlp.up_proj.weight \(1 missing\)"),
    "another model": (lambda f: _change_info(f, origin="other/model"), "got one of other/model, expected one of"),
    "no record": (lambda f: (f / INFO_FILE).unlink(), "no checkpoint there"),
    "no state": (lambda f: shutil.rmtree(optimizer_folder(f)), "optimizer.json"),
    "a file of the state": (
        lambda f: next(optimizer_folder(f).glob("rank-00001*/*.safetensors")).unlink(),
        "got an incomplete set of files",
    ),
    "checksums": (lambda f: (f / CHECKSUMS_FILE).write_text("{"), CHECKSUMS_FILE),
}


def _refuse(tp: TPGroup, checkpoint: Path, root: Path) -> list[tuple[str, str]]:
    """What each damaged checkpoint is refused with; nothing is written."""
    served = _served(tp, tp.size, checkpoint, root)
    served.step(0)
    sound = served.save("sound")
    served.step(1)
    weights, state, record = served.weights(), snapshot(served.trainer.optimizer), served.lineage.record
    found = []
    for number, (name, (damage, _)) in enumerate(DAMAGES.items()):
        folder = root / f"damaged-{number}"
        if tp.rank == 0:
            shutil.copytree(sound, folder)
            shutil.copytree(optimizer_folder(sound), root / f"{folder.name}.optimizer")
            damage(folder)
        tp.all_reduce_(torch.zeros(1))
        with pytest.raises((CheckpointError, RankFailedError)) as error:
            restoring.restore(served.target, served.trainer.optimizer, folder, "r", 2)
        found.append((name, str(error.value)))
        assert served.lineage.record == record
        assert same(state, snapshot(served.trainer.optimizer))
        assert all(torch.equal(local, weights[key]) for key, local in served.weights().items())
    return found


def test_what_is_damaged_or_foreign_is_refused_before_anything_is_written(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint, root = checkpoints / CASES[CASE].checkpoint, tmp_path / "checkpoints"
    for found in run_ranks(_refuse, 2, checkpoint, root):
        for name, message in found:
            assert re.search(DAMAGES[name][1], message, re.DOTALL), (name, message)


def _interrupt(tp: TPGroup, checkpoint: Path, root: Path, at: int) -> list[bool]:
    """A restore that raises on the last rank after so many tensors, and the next trainer."""
    restore.TOGETHER_BYTES = 1  # each tensor by itself
    served = _served(tp, tp.size, checkpoint, root)
    served.step(0)
    folder = served.save("first")
    served.step(1)
    torn = restore.Restore.write
    count = 0

    def parts(self: restore.Restore, names: list[str], *, owned: bool):
        nonlocal count
        count += not owned
        if count == at and tp.rank == tp.size - 1:
            raise OSError("injected")
        yield from original(self, names, owned=owned)

    original, restore.Restore._parts = restore.Restore._parts, parts  # type: ignore[method-assign]
    with pytest.raises((OSError, RankFailedError)):
        restoring.restore(served.target, served.trainer.optimizer, folder, "r1", 2)
    assert served.lineage.record.restoring == str(folder)
    restore.Restore._parts = original  # type: ignore[method-assign]
    assert restore.Restore.write is torn
    tp.all_reduce_(torch.zeros(1))
    served.start_again()
    assert served.lineage.record.restoring == str(folder)
    before = len(served.differing(folder))
    completed = restoring.complete_restore(served.target)
    record = served.lineage.record
    assert (record.restoring, record.weight_version, record.restore_id, record.step_count) == ("", 3, "r1", 1)
    return [completed, before > 0, served.differing(folder) == [], not restoring.complete_restore(served.target)]


def test_what_broke_off_is_completed_by_the_next_trainer(checkpoints: Path, tmp_path: Path) -> None:
    """The record says so from before the first write until all ranks have written."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    assert run_ranks(_interrupt, 2, checkpoint, tmp_path / "checkpoints", 7) == [[True] * 4] * 2


def _return(world: TPGroup, checkpoint: Path, root: Path) -> list[bool]:
    """Two replicas, of which one was away while the other completed a restore and went on."""
    served = _served(world, 1, checkpoint, root)
    served.step(0)
    folder = served.save("first")
    version = served.lineage.record.weight_version
    if world.rank == 1:
        served.lineage.update(restoring=str(folder))
    else:
        served.lineage.update(weight_version=version + 2, checkpoint=str(folder))
    weights = served.weights()
    found = [restoring.complete_restore(served.target)]
    if world.rank == 0:  # both were writing when their trainer was killed
        served.lineage.update(weight_version=version, restoring=str(folder))
    served.mapped.tensors["model.norm.weight"][1].add_(1.0)
    found.append(restoring.complete_restore(served.target))
    return [*found, all(torch.equal(local, weights[key]) for key, local in served.weights().items())]


def test_a_replica_that_missed_the_completion_does_not_undo_what_was_learned_since(
    checkpoints: Path, tmp_path: Path
) -> None:
    """It is filled, like one that was never trained. Where all were interrupted, all are completed."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    assert run_ranks(_return, 2, checkpoint, tmp_path / "checkpoints") == [[False, True, True]] * 2
