"""The folder of checkpoints: one trainer writes there, and clears up behind a crash."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from apollo_tp import runtime
from apollo_tp.checkpoint import folder as folders
from apollo_tp.config import CheckpointConfig, Config, ServerConfig
from apollo_tp.errors import ConfigError
from apollo_tp.launch import session
from apollo_tp.manifest import publish
from tests.unit.test_manifest import manifest


def _find_server(base: Path, name: str, stack: contextlib.ExitStack) -> None:
    """Rank 0 of a trainer of one rank, up to where it holds its server."""
    publish(manifest(0, 1, instance_id=name), runtime.instance_dir(name, base))
    server = ServerConfig(runtime_dir=str(base), instance=name, wait_seconds=0.0)
    config = Config(server=server, checkpoint=CheckpointConfig(dir=str(base / "checkpoints")))
    control = SimpleNamespace(gather=lambda content: [content], broadcast=lambda content: content)
    session._find_server(session._Start(config, SimpleNamespace(rank=0, size=1), control, stack))


def test_trainers_of_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    """`keep` would drop the other model's checkpoints: the second trainer is told whose the folder is, and what to do."""
    tmp_path.chmod(0o700)
    with contextlib.ExitStack() as stack:
        _find_server(tmp_path, "one", stack)
        with pytest.raises(ConfigError, match=rf"checkpoints, .*process {os.getpid()}\).*checkpoint\.dir=\.\.\."):
            _find_server(tmp_path, "two", stack)
    with contextlib.ExitStack() as stack:
        _find_server(tmp_path, "two", stack)


def test_files_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """The lock's own file, or a user's note, is no checkpoint."""
    (tmp_path / "note").touch()
    folders.begin(tmp_path, "first")
    folders.complete(tmp_path, "first", keep=1, served=Path("a/hub/id"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "latest", "note"]


def _checkpoint(root: Path, name: str, created_at: float, *, keep: int, served: Path) -> None:
    info = folders.CheckpointInfo(weight_version=1, model_path="m", optimizer="o", num_ranks=1, created_at=created_at)
    (folders.begin(root, name) / folders.INFO_FILE).write_bytes(msgspec.json.encode(info))
    folders.complete(root, name, keep, served)


def test_the_oldest_go_but_not_the_served_one(tmp_path: Path) -> None:
    """Nor what cannot be read, which does not make a complete checkpoint a failed one. A folder in the record's place
    stands for one that nobody may read."""
    (tmp_path / "lost+found" / folders.INFO_FILE).mkdir(parents=True)
    for number in range(1, 6):
        _checkpoint(tmp_path, f"c{number}", float(number), keep=2, served=tmp_path / "c1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c1", "c4", "c5", "latest", "lost+found"]


def test_what_a_crash_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    """Names are new each time, so it must not wait for its own; nothing else goes."""
    (folders.begin(tmp_path, "crashed") / "model.safetensors").touch()
    (tmp_path / ".cache").mkdir()
    assert folders.begin(tmp_path, "next").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", ".next.partial"]
