"""``apollo-tp push`` with the real huggingface_hub, against a server that answers as the hub does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from apollo_tp.checkpoint import optimizer_state
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.cli import main
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.shards.boxes import Shard
from apollo_tp.shards.manifest import CheckpointTensor
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.hub import TOKEN, Hub, running

ROOT = Path(__file__).parents[3]
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PUBLIC = {"README.md", "config.json", "model.safetensors.index.json", *FILES}


def _state(optimizer: object, folder: Path) -> None:
    folder.mkdir()
    (folder / "optimizer.json").write_text("{}")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Written by the real writer, of a source whose .gitignore would make a hub leave out the weights."""
    monkeypatch.setattr(optimizer_state, "save", _state)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / ".gitignore").write_text("*.safetensors\n")
    for name, file in zip("ab", FILES, strict=True):
        save_file({name: torch.ones(2, 2)}, source / file)
    listed = [
        CheckpointTensor(name=name, shape=[2, 2], dtype="F32", file=file)
        for name, file in zip("ab", FILES, strict=True)
    ]
    served = {name: (Shard(name, (2, 2), None, (), (0,)), torch.full((2, 2), 5.0)) for name in "ab"}
    writer = CheckpointWriter(
        tmp_path / "out", str(source), listed, served, Mesh.single(TPGroup.single()), keep=1,
        save_config=lambda folder: None,
    )  # fmt: skip
    optimizer = SimpleNamespace(describe=lambda: "apollo, rank 64: 2 matrices", state_bytes=lambda: 0)
    return writer.save("step-12", optimizer, 12)[0]  # type: ignore[arg-type]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub for this process, in which huggingface_hub has read its variables already."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def _push(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main.main(["push", *map(str, arguments)])
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    assert "Traceback" not in shown.err
    return status, shown.out, shown.err


def _alone(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which importing torch fails."""
    (folder / "block").mkdir()
    (folder / "block" / "torch.py").write_text("raise ImportError('this command needs no torch')")
    path = os.pathsep.join((str(folder / "block"), str(ROOT)))
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "apollo_tp.cli.main", "push", *arguments, "--json"], capture_output=True, text=True,
        env=env | {"PYTHONPATH": path, "HF_HOME": str(folder / "hf")} | variables, timeout=60, check=False,
    )  # fmt: skip


def test_a_dry_run_lists_what_is_published(checkpoint: Path, tmp_path: Path) -> None:
    """Without a network, a token or torch: neither optimizer state, nor our records, nor hidden files."""
    done = _alone(tmp_path, checkpoint, "me/model", "--dry-run", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    sizes = {file["path"]: file["bytes"] for file in answer["files"]}
    assert sizes == {name: (checkpoint / name).stat().st_size for name in PUBLIC}
    assert (answer["bytes"], answer["url"]) == (sum(sizes.values()), None)
    assert {".gitignore", "apollo_tp.json", "apollo_tp.checksums.json"} < {path.name for path in checkpoint.iterdir()}


@pytest.mark.parametrize(("large", "variables"), [("$^", {}), (r"\.safetensors$", {"HF_HUB_DISABLE_XET": "1"})])
def test_what_is_pushed_is_the_checkpoint(
    checkpoint: Path, tmp_path: Path, large: str, variables: dict[str, str]
) -> None:
    """Bit for bit, by both ways in which huggingface_hub uploads a folder: in batches, and, without xet, by the large file
    storage. The endpoint and the token come from huggingface_hub's own variables."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)  # where `hf auth login` puts it
    with running(Hub(large)) as hub:
        done = _alone(tmp_path, checkpoint.parent / "latest", "me/model", HF_ENDPOINT=hub.url, **variables)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.branches["me/model"]["main"] == {name: (checkpoint / name).read_bytes() for name in PUBLIC}
    assert hub.messages == ["Upload step-12"]
    assert json.loads(done.stdout)["url"].startswith(f"{hub.url}/me/model/commit/")
    assert any("/lfs/" in path for path in hub.seen) == bool(variables)


def test_weights_of_an_earlier_upload_do_not_stay(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers and vLLM would load model.safetensors instead of the files of the index. Everything else stays."""
    others = {"model.safetensors": b"old", "notes.md": b"mine", "onnx/model.safetensors": b"mine"}
    hub.add("me/model", **others)
    status, out, _ = _push(capsys, checkpoint, "me/model", "--message", "Better")
    assert status == 0
    assert "removed from the repository: model.safetensors" in out
    assert set(hub.branches["me/model"]["main"]) == PUBLIC | {"notes.md", "onnx/model.safetensors"}
    assert hub.messages == ["Better"]


def test_a_revision_is_a_branch_and_private_is_private(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, _ = _push(capsys, checkpoint, "me/model", "--private", "--revision", "run/2")
    assert (status, hub.private["me/model"]) == (0, True)
    assert (hub.branches["me/model"]["main"], set(hub.branches["me/model"]["run/2"])) == ({}, PUBLIC)
    hub.add("me/shown")
    status, _, err = _push(capsys, checkpoint, "me/shown", "--private")
    assert status == 1
    assert "--private: got me/shown, which is there and public" in err
    assert hub.branches["me/shown"]["main"] == {}


def test_what_the_hub_refuses_is_a_sentence(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = _push(capsys, checkpoint, "them/model")
    assert status == 1
    assert "them/model: got" in err
    assert "name a repository of your own" in err
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 1
    assert f"token: got one that {hub.url} does not know" in err
    assert "hf_another" not in err
    monkeypatch.delenv("HF_TOKEN")
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 1
    assert (
        "token: got none, expected one that may write to the hub; log in with `hf auth login`, or set HF_TOKEN" in err
    )
    assert hub.branches == {}


def test_without_a_network(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 1
    assert "http://127.0.0.1:9: got no answer (ConnectError" in err
    assert "check the network and HF_ENDPOINT" in err


def test_a_repository_that_disappears(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being made and being filled."""
    monkeypatch.setattr(hub, "_create", lambda asked: (200, {"url": f"{hub.url}/me/model"}))
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 1
    assert "me/model: got no such repository or owner" in err


def test_a_checkpoint_that_is_removed_meanwhile(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is when newer ones are written."""
    create = hub._create

    def remove_first(asked):
        checkpoint.rename(checkpoint.with_name(".step-12.partial"))
        return create(asked)

    monkeypatch.setattr(hub, "_create", remove_first)
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 1
    assert f"{checkpoint}: got a checkpoint that was removed, expected it to stay during its upload" in err
    assert hub.branches["me/model"]["main"] == {}


def test_a_card_that_the_hub_refuses(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an edit; nothing is uploaded."""
    monkeypatch.setattr(hub, "card_errors", [{"message": "license: unknown"}])
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 1
    assert "me/model: got Invalid metadata in README.md" in err
    assert "license: unknown" in err
    assert hub.branches["me/model"]["main"] == {}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "apollo_tp.json").unlink(), "got a folder without apollo_tp.json, expected a checkpoint"),
        (lambda folder: (folder / ".apollo_tp_partial").touch(), "got a checkpoint that is not complete"),
        (lambda folder: (folder / FILES[1]).unlink(), "got no 'b', expected all tensors that model.safetensors.index"),
        (lambda folder: os.truncate(folder / FILES[1], 100), f"{FILES[1]}: got a damaged or cut-off file"),
        (lambda folder: (folder / "config.json").unlink(), "got no config.json"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("["), "expected a weight_map as JSON"),
        (lambda folder: shutil.copy(folder / FILES[0], folder / FILES[1]), "got no 'b', expected all tensors"),
        (lambda folder: (folder / "apollo_tp.json").write_text("{"), "got an unreadable record"),
    ],
)  # fmt: skip
def test_an_incomplete_checkpoint_is_refused(
    checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture[str], damage, said: str
) -> None:
    """Before anything is asked of the hub."""
    damage(checkpoint)
    status, _, err = _push(capsys, checkpoint, "me/model")
    assert status == 2
    assert said in err
    assert hub.seen == []


def test_names_are_those_of_the_coordinator(
    checkpoint: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint whose folder is elsewhere, was never written, or of which nobody knows, the reason is said."""
    with (
        CoordinatorProcess(tmp_path) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks,
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        made = client.post("/checkpoint", json={"wait": True}).json()
        ranks.fail_saves = True
        failed = client.post("/checkpoint", json={"wait": True}).json()
        for name, expected, said in (
            (made["name"], 1, f"whose folder /ckpt/{made['name']} is not here"),
            (failed["id"], 1, "which is failed and has no folder, expected a checkpoint that was written"),
            ("unknown", 1, "404: "),
            ("no/folder", 2, "where no folder is, expected the folder of a checkpoint"),
        ):
            status, _, err = _push(capsys, name, "me/model", "--url", coordinator.url)
            assert (status, said in err) == (expected, True), err
    status, _, err = _push(capsys, "unknown", "me/model", "--url", coordinator.url)
    assert status == 3
    assert "which is no folder here; as for a checkpoint of that name, no coordinator answers" in err
    assert _push(capsys, checkpoint, "model")[::2] == (
        2, "apollo-tp: REPO_ID: got 'model', expected OWNER/NAME, the owner being you or an organization\n",
    )  # fmt: skip
