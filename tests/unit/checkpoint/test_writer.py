"""A checkpoint of several files, of which the server holds a part: as those of real models are."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from apollo_tp.checkpoint import CheckpointWriter, optimizer_state
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.shards.boxes import Shard
from apollo_tp.shards.manifest import CheckpointTensor

OLD = {"schema_version": 1, "weight_version": 99, "model_path": "x", "created_at": 1.0, "num_ranks": 1, "optimizer": ""}
ONE, TWO = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def test_files_are_indexed_and_what_is_not_served_is_carried_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft heads and vision towers keep their values; nobody else may read any of it; an older record does not stay."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(2, 2), "kept": torch.full((3,), 7.0)}, source / ONE)
    save_file({"b": torch.ones(2)}, source / TWO)
    (source / "config.json").write_text("{}")
    (source / "apollo_tp.json").write_text(json.dumps(OLD))
    listed = [
        CheckpointTensor(name=name, shape=list(shape), dtype="F32", file=file)
        for name, shape, file in (("a", (2, 2), ONE), ("kept", (3,), ONE), ("b", (2,), TWO))
    ]
    served = {
        name: (Shard(name, shape, None, (), (0,)), torch.full(shape, 5.0))
        for name, shape in (("a", (2, 2)), ("b", (2,)))
    }
    optimizer = SimpleNamespace(describe=lambda: "")
    monkeypatch.setattr(optimizer_state, "save", lambda optimizer, folder: None)
    writer = CheckpointWriter(
        tmp_path / "out", str(source), listed, served, TPGroup.single(), keep=1, save_config=lambda folder: None
    )
    path, _ = writer.save("x", optimizer, 1)  # type: ignore[arg-type]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": ONE, "kept": ONE, "b": TWO}
    assert load_file(path / ONE)["kept"].tolist() == [7.0] * 3
    assert load_file(path / ONE)["a"].tolist() == [[5.0] * 2] * 2
    assert load_file(path / TWO)["b"].tolist() == [5.0] * 2
    assert json.loads((path / "apollo_tp.json").read_text())["weight_version"] == 1
    assert not any(stat.S_IMODE(each.stat().st_mode) & 0o077 for each in (path, *path.rglob("*")))
