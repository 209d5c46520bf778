"""A checkpoint of several files, of which the server holds a part: as those of real models are."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from apollo_tp.checkpoint import optimizer_state
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.shards.boxes import Shard
from apollo_tp.shards.manifest import CheckpointTensor
from apollo_tp.shards.mapping import MappedRank

OLD = {"schema_version": 1, "weight_version": 99, "model_path": "x", "created_at": 1.0, "num_ranks": 1, "optimizer": ""}
ONE, TWO = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture(autouse=True)
def _no_optimizer_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_state, "save", lambda optimizer, folder: None)


def _save(source: Path, listed: list[CheckpointTensor], served: dict[str, tuple[Shard, torch.Tensor]]) -> Path:
    optimizer = SimpleNamespace(describe=lambda: "")
    writer = CheckpointWriter(
        source.parent / "out",
        str(source),
        listed,
        served,
        Mesh.single(TPGroup.single()),
        keep=1,
        save_config=lambda folder: None,
    )
    return writer.save("x", optimizer, 1)[0]  # type: ignore[arg-type]


def test_files_are_indexed_and_what_is_not_served_is_carried_over(tmp_path: Path) -> None:
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
    path = _save(source, listed, served)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": ONE, "kept": ONE, "b": TWO}
    assert load_file(path / ONE)["kept"].tolist() == [7.0] * 3
    assert load_file(path / ONE)["a"].tolist() == [[5.0] * 2] * 2
    assert load_file(path / TWO)["b"].tolist() == [5.0] * 2
    assert json.loads((path / "apollo_tp.json").read_text())["weight_version"] == 1
    assert not any(stat.S_IMODE(each.stat().st_mode) & 0o077 for each in (path, *path.rglob("*")))


def test_each_range_of_a_tensor_goes_to_its_own_rows(tmp_path: Path) -> None:
    """A rank of a fused tensor holds query, key and value rows side by side that lie apart in the checkpoint."""
    source = tmp_path / "source"
    source.mkdir()
    listed = []
    for name in ("rows", "columns"):
        listed.append(CheckpointTensor(name=name, shape=[6, 6], dtype="F32", file="model.safetensors"))
    save_file({name: torch.full((6, 6), 9.0) for name in ("rows", "columns")}, source / "model.safetensors")
    whole, ranges = torch.arange(36.0).view(6, 6), ((0, 2), (3, 4), (5, 6))
    own = torch.tensor([0, 1, 3, 5])
    served = {
        "rows": (Shard("rows", (6, 6), 0, ranges, (0,)), whole[own]),
        "columns": (Shard("columns", (6, 6), 1, ranges, (0,)), whole[:, own]),
    }
    found = load_file(_save(source, listed, served) / "model.safetensors")
    assert torch.equal(found["rows"][own], whole[own])
    assert torch.equal(found["columns"][:, own], whole[:, own])


def test_second_copies_in_other_files_get_the_trained_values(tmp_path: Path) -> None:
    """Also in a file of which the server loads nothing, which is written then and not linked. In a wider dtype than the
    source's, if that is what is served: trained values would be rounded."""
    source = tmp_path / "source"
    source.mkdir()
    old, trained = torch.ones(4, 2), torch.arange(8.0).view(4, 2) + 2**-12
    save_file({"embedding": old, "kept": old + 1}, source / ONE)
    save_file({"head": old, "draft": old.bfloat16()}, source / TWO)
    listed = [
        CheckpointTensor(name=name, shape=[4, 2], dtype=dtype, file=file)
        for name, dtype, file in (
            ("embedding", "F32", ONE), ("kept", "F32", ONE), ("head", "F32", TWO), ("draft", "BF16", TWO)
        )
    ]  # fmt: skip
    shard = Shard("embedding", (4, 2), None, (), (0,))
    mapped = MappedRank(
        None,  # type: ignore[arg-type]
        torch.device("cpu"), {"embedding": (shard, trained)}, {}, copies={"head": "embedding", "draft": "embedding"},
    )  # fmt: skip
    path = _save(source, listed, mapped.stored)
    found = load_file(path / ONE) | load_file(path / TWO)
    assert {name: torch.equal(tensor.float(), trained) for name, tensor in found.items()} == {
        "embedding": True, "kept": False, "head": True, "draft": True,
    }  # fmt: skip
    assert load_file(source / TWO)["head"].equal(old), "the source stays what it was"


@pytest.mark.parametrize("router", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("matrix", [torch.bfloat16, torch.float32])
def test_the_config_says_in_which_dtype_the_weights_are(
    matrix: torch.dtype, router: torch.dtype, tmp_path: Path
) -> None:
    """A bf16 model that is served with --dtype float32 is saved in fp32; one tensor that is held wider changes nothing."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({name: torch.ones(2, 2, dtype=torch.bfloat16) for name in "ab"}, source / "model.safetensors")
    config = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "layers": [1]}, "name": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    listed = [CheckpointTensor(name=name, shape=[2, 2], dtype="BF16", file="model.safetensors") for name in "ab"]
    held = {"a": matrix, "b": router}
    served = {name: (Shard(name, (2, 2), None, (), (0,)), torch.ones(2, 2, dtype=held[name])) for name in "ab"}
    path = _save(source, listed, served)
    assert {name: value.dtype for name, value in load_file(path / "model.safetensors").items()} == held
    said = "float32" if matrix == router == torch.float32 else "bfloat16"
    expected = {"dtype": said, "text_config": {"torch_dtype": said, "layers": [1]}, "name": "bfloat16"}
    assert json.loads((path / "config.json").read_text()) == expected
    assert json.loads((source / "config.json").read_text()) == config
