"""The folder of checkpoints: one trainer writes there, and clears up behind a crash."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from apollo_tp.checkpoint import folder as folders
from apollo_tp.config import CheckpointConfig, Config, ServerConfig
from apollo_tp.distributed.control import Control
from apollo_tp.errors import ConfigError
from apollo_tp.launch import stages
from apollo_tp.launch.distributed import World
from apollo_tp.launch.hosts import meet
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import served_models
from apollo_tp.shards.manifest import publish
from tests.support.manifests import manifest


def _find_server(base: Path, name: str, stack: contextlib.ExitStack) -> None:
    """Rank 0 of a trainer of one rank, up to where it holds its server."""
    publish(manifest(0, 1, instance_id=name), instance_folder.instance_dir(name, base))
    server = ServerConfig(runtime_dir=str(base), instance=name, wait_seconds=0.0)
    config = Config(server=server, checkpoint=CheckpointConfig(dir=str(base / "checkpoints")))
    control = Control(0, 1)
    hosts = meet(control, config)
    joined = stages.Joined(config=config, stack=stack, world=World(0, 1), hosts=hosts, control=control)
    own = stages.take_place(joined).own
    assert own is not None
    stages._hold(joined, base / own.instance, own, True, own.instance, has_port=True)


def test_trainers_of_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    """At a time: what one is writing is to the other what a crash left. The second is told whose the folder is, and what
    to do."""
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
    _checkpoint(tmp_path, "first", 1.0, keep=1, served=[Path("a/hub/id")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "latest", "note"]


def _checkpoint(
    root: Path,
    name: str,
    created_at: float,
    *,
    keep: int,
    served: Collection[Path] = (),
    path: str = "m",
    origin: str = "m",
) -> None:
    info = folders.CheckpointInfo(
        weight_version=1, model_path=path, optimizer="o", num_ranks=1, created_at=created_at, origin=origin
    )
    (folders.begin(root, name) / "model.safetensors").touch()
    folders.complete(root, name, info, keep, lambda: served)


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.is_symlink())


def test_what_other_live_servers_were_started_from_stays(tmp_path: Path) -> None:
    """All servers below the same folder are asked; one that cannot be read leaves everything in place."""
    tmp_path.chmod(0o700)
    root = tmp_path / "checkpoints"
    instance = instance_folder.instance_dir("other", tmp_path)
    publish(manifest(0, 1, instance_id="other", model_path=str(root / "c1")), instance)

    def write(number: int) -> list[str]:
        info = folders.CheckpointInfo(
            weight_version=1, model_path="m", optimizer="o", num_ranks=1, created_at=float(number), origin="m"
        )
        folders.begin(root, f"c{number}")
        folders.complete(root, f"c{number}", info, 1, lambda: served_models(tmp_path))
        return _names(root)

    assert [write(number) for number in (1, 2, 3)] == [["c1"], ["c1", "c2"], ["c1", "c3"]]
    (instance / "rank0.json").write_text('{"schema_version": 0}')
    assert write(4) == ["c1", "c3", "c4"]
    (instance / "rank0.json").unlink()
    assert write(5) == ["c5"]


def test_the_oldest_go_but_not_the_served_one(tmp_path: Path) -> None:
    """Nor what cannot be read, which does not make a complete checkpoint a failed one. A folder in the record's place
    stands for one that nobody may read."""
    (tmp_path / "lost+found" / folders.INFO_FILE).mkdir(parents=True)
    for number in range(1, 6):
        _checkpoint(tmp_path, f"c{number}", float(number), keep=2, served=[tmp_path / "c1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c1", "c4", "c5", "latest", "lost+found"]


def test_what_a_crash_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    """Names are new each time, so it must not wait for its own; nothing else goes."""
    (folders.begin(tmp_path, "crashed") / "model.safetensors").touch()
    (tmp_path / ".cache").mkdir()
    assert folders.begin(tmp_path, "next").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", ".next.partial"]


def test_another_models_checkpoints_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One trainer after the other writes to the same folder. The second one's origin counts, not the checkpoint that it was
    served from; each removal is logged."""
    caplog.set_level(logging.INFO, "apollo_tp")
    for number in range(1, 4):
        _checkpoint(tmp_path, f"a{number}", float(number), keep=2, origin="a")
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == [
        f"{tmp_path / 'a1'} removed: checkpoint.keep=2, and there are newer ones of a"
    ]
    for number in range(4, 7):
        _checkpoint(tmp_path, f"b{number}", float(number), keep=2, origin="b")
    assert _names(tmp_path) == ["a2", "a3", "b5", "b6"]
    origin = folders.origin_of(str(tmp_path / "a3"))
    _checkpoint(tmp_path, "a7", 7.0, keep=2, path=str(tmp_path / "a3"), origin=origin, served=[tmp_path / "a3"])
    assert _names(tmp_path) == ["a3", "a7", "b5", "b6"]
    assert folders.origin_of("a/hub/id") == "a/hub/id"


def test_a_record_without_origin_counts_for_the_same_model_path_alone(tmp_path: Path) -> None:
    """Those of older versions."""
    _checkpoint(tmp_path, "old-a", 1.0, keep=9, path="a", origin="")
    _checkpoint(tmp_path, "old-b", 2.0, keep=9, path="b", origin="")
    _checkpoint(tmp_path, "new-a", 3.0, keep=1, path="a", origin="a")
    assert _names(tmp_path) == ["new-a", "old-b"]
    assert folders.origin_of(str(tmp_path / "old-b")) == "b"


def test_the_newest_stays_newest_if_the_clock_goes_back(tmp_path: Path) -> None:
    for number, clock in enumerate((1003.0, 1001.0, 1002.0)):
        _checkpoint(tmp_path, f"c{number}", clock, keep=1)
        assert _names(tmp_path) == [f"c{number}"]
    _checkpoint(tmp_path, "c3", 1.0, keep=9)
    _checkpoint(tmp_path, "c4", 2.0, keep=2)
    assert _names(tmp_path) == ["c3", "c4"]


def test_what_a_kill_left_of_an_old_checkpoint_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes, with or without a record: it is a checkpoint no more, before the first file goes."""
    with monkeypatch.context() as patch:
        patch.setattr("apollo_tp.runtime.owned_folder.remove_tree", lambda folder, *_, **__: None)  # as far as it came
        for number in range(1, 4):
            _checkpoint(tmp_path, f"c{number}", float(number), keep=1)
    assert _names(tmp_path) == [".c1.partial", ".c2.partial", "c3"]
    _checkpoint(tmp_path, "c4", 4.0, keep=2)
    assert _names(tmp_path) == ["c3", "c4"]


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before ``latest`` points to it, and older ones are removed: power may fail between any two of these."""
    order: list[str] = []

    def noted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            order.append(f"{name} {Path(arguments[-1]).name}")
            function(*arguments)

        return call

    _checkpoint(tmp_path, "first", 1.0, keep=1)
    for name in ("fsync", "fsync_tree"):
        monkeypatch.setattr(folders, name, noted(name, getattr(folders, name)))
    monkeypatch.setattr(folders, "_remove", lambda path, why: order.append(f"remove {path.name}"))
    monkeypatch.setattr(os, "rename", noted("rename", os.rename))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    _checkpoint(tmp_path, "second", 2.0, keep=1)
    steps = ["fsync_tree .second.partial", "rename second", "replace latest", f"fsync {tmp_path.name}", "remove first"]
    assert [step for step in order if step in steps] == steps
    flushed = order[order.index(steps[0]) : order.index(steps[1])]
    assert {"fsync model.safetensors", "fsync apollo_tp.json", "fsync .second.partial"} <= set(flushed)
