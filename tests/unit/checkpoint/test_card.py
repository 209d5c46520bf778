"""The model card, and what a checkpoint says of the machine that it was made on: nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from apollo_tp.checkpoint import folder as folders
from apollo_tp.checkpoint import optimizer_state, read_info
from apollo_tp.checkpoint.card import Trained, public_name
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CheckpointError
from apollo_tp.shards.boxes import Shard
from apollo_tp.shards.manifest import CheckpointTensor

HUB = "/root/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/abc"
TRAINED = Trained(jobs=2, steps=12, samples=345, tokens=67_890, loss_tokens=1234, loss=0.5)
SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: [de]\ndatasets: [secret]\n---\n# The base model\n"


def _writer(source: Path) -> CheckpointWriter:
    listed = [CheckpointTensor(name="a", shape=[2, 2], dtype="F32", file="model.safetensors")]
    served = {"a": (Shard("a", (2, 2), None, (), (0,)), torch.zeros(2, 2))}
    return CheckpointWriter(
        source.parent / "out", str(source), listed, served, Mesh.single(TPGroup.single()), keep=1,
        save_config=lambda folder: None, trained=lambda: TRAINED,
    )  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "my base"
    folder.mkdir()
    save_file({"a": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _state(optimizer: object, folder: Path) -> None:
    folder.mkdir()
    (folder / "optimizer.json").write_text("{}")


OPTIMIZER = SimpleNamespace(describe=lambda: "apollo, rank 64: 5 matrices", state_bytes=lambda: 1000)


@pytest.mark.parametrize("card", [SOURCE_CARD, "", "---\n: [\n---\n", "no front matter"])
def test_the_card_has_origin_data_counts_and_figures(source: Path, monkeypatch: pytest.MonkeyPatch, card: str) -> None:
    """License and language stay those of the base model; a card that cannot be read stops no checkpoint."""
    monkeypatch.setattr(optimizer_state, "save", _state)
    (source / "README.md").write_text(card)
    path, num_bytes = _writer(source).save("step-12", OPTIMIZER, 12)  # type: ignore[arg-type]
    assert path.stat().st_mode & 0o077 == (path / "README.md").stat().st_mode & 0o077 == 0
    written = ModelCard.load(path / "README.md")
    data = written.data.to_dict()
    assert (data["library_name"], "apollo_tp" in data["tags"]) == ("transformers", True)
    assert (data.get("license"), data.get("language")) == (
        ("apache-2.0", ["de"]) if card is SOURCE_CARD else (None, None)
    )
    assert "base_model" not in data  # a folder of this machine is nothing that the hub could link to
    for line in ("base model | `my base` |", "jobs | 2 |", "steps | 12 |", "epoch | 345 |", "tokens | 67,890 |",
                 "learned from | 1,234 |", "step | 0.5000 |", "optimizer | apollo, rank 64 |"):  # fmt: skip
        assert line in written.text
    assert "The base model" not in written.text
    info = read_info(path)
    assert info is not None
    assert info.trained == TRAINED
    texts = "".join(file.read_text() for file in path.iterdir() if file.suffix in (".json", ".md"))
    assert str(source.parent) not in texts
    assert sorted(file.name for file in path.parent.iterdir()) == ["latest", "step-12", "step-12.optimizer"]
    assert folders.optimizer_folder(path) == path.with_name("step-12.optimizer")
    files = [file for folder in (path, folders.optimizer_folder(path)) for file in folder.rglob("*") if file.is_file()]
    assert num_bytes == sum(file.stat().st_size for file in files)


def test_a_model_of_the_hub_is_named_by_its_id() -> None:
    """Also from the cache; names of folders differ by place, and are names of names already."""
    assert public_name(HUB) == "Qwen/Qwen3-0.6B"
    assert public_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    one, other = public_name("/a/model"), public_name("/b/model")
    assert (one != other, one.startswith("model@"), public_name(one)) == (True, True, one)


def test_state_that_an_earlier_version_wrote_within_is_found(tmp_path: Path) -> None:
    (tmp_path / "old" / "optimizer").mkdir(parents=True)
    assert folders.optimizer_folder(tmp_path / "old") == tmp_path / "old" / "optimizer"
    assert folders.optimizer_folder(tmp_path / "new") == tmp_path / "new.optimizer"


def _info(origin: str) -> folders.CheckpointInfo:
    return folders.CheckpointInfo(
        weight_version=1, model_path=origin, optimizer="o", num_ranks=1, created_at=1.0, origin=origin
    )


def test_state_goes_with_its_checkpoint_and_nobody_elses_does(tmp_path: Path) -> None:
    """When old ones are removed, after a crash between the two renames, and when one was not completed. A folder of that
    name that a user made stays, and its name is not taken."""

    def begin(name: str) -> None:
        (folders.begin(tmp_path, name) / "optimizer").mkdir()

    for name in ("a", "b"):
        begin(name)
        folders.complete(tmp_path, name, _info("/m"), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.optimizer", "latest"]
    begin("crashed")
    folders.owned_folder.mark(tmp_path / ".crashed.partial" / "optimizer", "optimizer")
    os.rename(tmp_path / ".crashed.partial" / "optimizer", tmp_path / "crashed.optimizer")
    begin("c")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.partial", "b", "b.optimizer", "latest"]
    folders.discard(tmp_path, "c")
    folders.discard(tmp_path, "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.optimizer", "latest"]
    (tmp_path / "mine.optimizer").mkdir()
    with pytest.raises(CheckpointError, match=r"mine\.optimizer: got a name that is taken"):
        folders.begin(tmp_path, "mine")


def test_checkpoints_of_older_versions_count_as_the_same_model(tmp_path: Path) -> None:
    """Their records have paths."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "apollo_tp.json").write_text(
        '{"weight_version": 1, "model_path": "/m", "optimizer": "", "num_ranks": 1, "created_at": 1.0, "origin": "/m"}'
    )
    folders.begin(tmp_path, "new")
    folders.complete(tmp_path, "new", _info("/m"), 1)
    assert not old.exists()


@pytest.mark.parametrize("where", ["weights", "optimizer state"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_folder_what_is_needed_and_free_and_the_cure(
    source: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def state_full(optimizer: object, folder: Path) -> None:
        raise CheckpointError(f"optimizer state: got CheckpointException: {os.strerror(number)}")

    monkeypatch.setattr(optimizer_state, "save", state_full)
    if where == "weights":
        monkeypatch.setattr(os, "posix_fallocate", full)
    needed = r"expected about 1,\d\d\d for a checkpoint \(weights \d+, optimizer state 1,000\)"
    with pytest.raises(
        CheckpointError, match=rf"checkpoint\.dir .*/out: got [\d,]+ bytes free .*{needed}; .*keep"
    ) as found:
        _writer(source).save("x", OPTIMIZER, 1)  # type: ignore[arg-type]
    assert os.strerror(number) in str(found.value)
    assert not any(path.name.endswith(".partial") for path in (source.parent / "out").iterdir())
