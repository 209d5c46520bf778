"""What else is removed or taken into use: servers' folders, unfinished checkpoints, the demo's output, locks, sockets."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from apollo_tp.checkpoint import folder as folders
from apollo_tp.coordinator.jobs.rank_link import bind_private
from apollo_tp.errors import CheckpointError, ConfigError
from apollo_tp.runtime import instance_folder, owned_folder, private_files
from apollo_tp.shards.instance import CLAIMED_VARIABLE, REFUSED_VARIABLE, SERVER_LOCK, claim_instance
from apollo_tp.shards.manifest import publish
from tests.support.manifests import ended_process, manifest


def _precious(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(b"precious")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A runtime folder."""
    tmp_path.chmod(0o700)
    return tmp_path


# --- the runtime folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gone", "file/below"])
def test_a_runtime_folder_that_leads_nowhere_is_an_error_that_names_it(
    base: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """No traceback, wherever it was named."""
    _precious(base / "file")
    link = base / "link"
    link.symlink_to(base / target)
    with pytest.raises(
        ConfigError, match=rf"{private_files.RUNTIME_DIR_VARIABLE}.*{link}: got a link to {base / target}"
    ):
        instance_folder.base_dir(str(link))
    monkeypatch.setenv(private_files.RUNTIME_DIR_VARIABLE, str(link))
    with pytest.raises(ConfigError, match="got a link"):
        instance_folder.base_dir()
    with pytest.raises(ConfigError, match="got something that is no folder"):
        instance_folder.base_dir(str(base / "file"))


def test_a_folder_of_the_users_does_not_become_a_servers(base: Path) -> None:
    """With the base in a home, an instance id may be the name of a folder there; the next server would have emptied it."""
    note = _precious(base / "Documents" / "thesis.tex")
    with pytest.raises(ConfigError, match=r"instance id Documents: got .*holds 'thesis\.tex'"):
        instance_folder.instance_dir("Documents", base)
    assert [path.name for path in note.parent.iterdir()] == ["thesis.tex"]


WRITTEN = (
    "rank0.json", "rank12.json", "serving.json", "weights.json", "coordinator.json", "coordinator_settings.json",
    "trainer.lock", SERVER_LOCK, ".rank0.json.ab_12xyz",
)  # fmt: skip


def test_of_an_ended_server_goes_what_servers_write_and_nothing_else(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The name is free all the same. A folder without anything else goes as a whole."""
    caplog.set_level(logging.INFO, "apollo_tp")
    monkeypatch.setenv(private_files.RUNTIME_DIR_VARIABLE, str(base))
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "new")
    monkeypatch.setenv(CLAIMED_VARIABLE, "")
    monkeypatch.setenv(REFUSED_VARIABLE, "")
    dead = ended_process()
    for name in ("kept", "gone"):
        folder = instance_folder.instance_dir(name, base)
        for file in WRITTEN:
            _precious(folder / file)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / "sync.sock"))
        (folder / "rank12.json").unlink()
        publish(manifest(0, 1, instance_id=name, pid=dead.pid, pid_start_ticks=dead.start_ticks), folder)
    note = _precious(base / "kept" / "notes" / "thesis.tex")
    assert claim_instance() == "new"
    assert note.read_bytes() == b"precious"
    assert sorted(path.name for path in (base / "kept").iterdir()) == [SERVER_LOCK, "notes"]
    assert not (base / "gone").exists()
    assert f"{base / 'gone' / 'weights.json'} removed: server gone has ended" in caplog.text
    assert "left alone, since no server wrote it: 'notes'" in caplog.text
    assert instance_folder.instance_dir("kept", base).is_dir()


def test_a_link_to_an_ended_servers_folder_stays(base: Path) -> None:
    note = _precious(base / "elsewhere" / SERVER_LOCK)
    (base / "server").symlink_to(note.parent)
    instance_folder.remove_instance(base / "server")
    assert note.exists()
    instance_folder.remove_instance(base / "never")


def test_names_that_are_written_are_names_that_are_removed(base: Path) -> None:
    """One that this list does not know would stay for ever."""
    for name in (*WRITTEN, "ranks.sock", "coordinator.sock", "sync.sock"):
        assert private_files.INSTANCE_FILES.fullmatch(name), name


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_is_not_taken_through_a_link(base: Path, make: Callable[[Path, Path], None]) -> None:
    """Its file is emptied: in a folder that others can write, through a link, that was any file of ours."""
    other = _precious(base / "other")
    make(base / ".writer.lock", other)
    with pytest.raises(ConfigError, match=r"\.writer\.lock: got "), folders.writer_lock(base):
        pass
    assert other.read_bytes() == b"precious"


def test_only_a_socket_makes_room_for_a_socket(base: Path) -> None:
    note = _precious(base / "ranks.sock")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        with pytest.raises(ConfigError, match=r"ranks\.sock: got -rw.*expected nothing or a socket"):
            bind_private(router, note)
        assert note.read_bytes() == b"precious"
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(base / "left.sock"))
        bind_private(router, base / "left.sock")
        bind_private(router, base / "new.sock")


def test_a_file_that_could_not_be_written_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary one; and what was there stays."""
    note = _precious(base / "weights.json")

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(private_files.os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            private_files.write_private(note, b"new")
    assert [(path.name, path.read_bytes()) for path in base.iterdir()] == [("weights.json", b"precious")]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoint(root: Path, name: str, created_at: float, keep: int = 9) -> None:
    info = folders.CheckpointInfo(
        weight_version=1, model_path="m", optimizer="o", num_ranks=1, created_at=created_at, origin="m"
    )
    (folders.begin(root, name) / "model.safetensors").touch()
    folders.complete(root, name, info, keep)


def test_a_folder_that_is_only_called_like_a_partial_checkpoint_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a download of the user's. What we began is known by its marker, which a complete one does not have."""
    caplog.set_level(logging.INFO, "apollo_tp")
    note = _precious(tmp_path / ".download.partial" / "part1")
    private = _precious(tmp_path / "elsewhere" / owned_folder.marker(Path(), "partial").name)
    (tmp_path / ".link.partial").symlink_to(private.parent)
    (folders.begin(tmp_path, "crashed") / "model.safetensors").touch()
    _checkpoint(tmp_path, "c1", 1.0)
    assert note.exists()
    assert private.exists()
    assert not (tmp_path / ".crashed.partial").exists()
    assert f"{tmp_path / '.crashed.partial'} removed" in caplog.text
    assert f"{note.parent} is left alone" in caplog.text
    assert sorted(path.name for path in (tmp_path / "c1").iterdir()) == [folders.INFO_FILE, "model.safetensors"]


def test_a_checkpoint_that_was_not_begun_discards_nothing(tmp_path: Path) -> None:
    """The name was taken, say: then `.NAME.partial` is not of this writer."""
    note = _precious(tmp_path / ".c1.partial" / "mine")
    folders.discard(tmp_path, "c1")
    assert note.exists()
    shutil.rmtree(note.parent)
    folders.begin(tmp_path, "c1")
    folders.discard(tmp_path, "c1")
    assert not (tmp_path / ".c1.partial").exists()


def test_a_copy_of_a_checkpoint_under_another_name_is_the_users(tmp_path: Path) -> None:
    """It has the record, but nobody asked for its removal; that of the copied one goes on."""
    _checkpoint(tmp_path, "c1", 1.0)
    shutil.copytree(tmp_path / "c1", tmp_path / "my-best")
    _checkpoint(tmp_path, "c2", 2.0, keep=1)
    _checkpoint(tmp_path, "c3", 3.0, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c3", "latest", "my-best"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_latest_that_is_not_ours_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """Said before a checkpoint is written, not after."""
    latest = tmp_path / "latest"
    if kind == "link":
        latest.symlink_to("/models/mine")
    else:
        _precious(latest if kind == "file" else latest / "model.bin")
    before = latest.lstat()
    with pytest.raises(CheckpointError, match="latest: got what apollo_tp did not make"):
        _checkpoint(tmp_path, "c1", 1.0)
    assert latest.lstat().st_ino == before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_folder_of_checkpoints_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(ConfigError, match=r"checkpoint\.dir .*link: got a link"),
        folders.writer_lock(tmp_path / "link"),
    ):
        pass


def test_what_a_kill_leaves_of_a_removal_is_still_known_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The marker goes last; a failure is logged, and the next try ends it."""
    partial = folders.begin(tmp_path, "c1")
    _precious(partial / "optimizer" / "state")
    _precious(partial / "model.safetensors")

    def fail(path: str) -> None:
        raise OSError(5, "input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(owned_folder.shutil, "rmtree", fail)
        folders.discard(tmp_path, "c1")
    assert "could not be removed (it was not completed): [Errno 5]" in caplog.text
    assert owned_folder.is_marked(partial, folders.PARTIAL)
    folders.discard(tmp_path, "c1")
    assert not partial.exists()


# --- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_removes_only_what_a_demo_wrote(tmp_path: Path) -> None:
    """`--out` of a folder of the user's was a folder of the user's no more."""
    from examples.demo.__main__ import OUTPUTS
    from examples.demo.common import prepare

    note = _precious(tmp_path / "home" / "thesis.tex")
    _precious(tmp_path / "home" / "model" / "mine")
    with pytest.raises(ConfigError, match=r"--out .*holds 'model', 'thesis\.tex'"):
        prepare(tmp_path / "home", OUTPUTS)
    assert note.exists()
    prepare(tmp_path / "out", OUTPUTS)
    for name in ("model/config.json", "checkpoints/c1/x", "service/jobs.sqlite3", "server.log", "result.json"):
        _precious(tmp_path / "out" / name)
    kept = _precious(tmp_path / "out" / "notes.txt")
    prepare(tmp_path / "out", OUTPUTS)
    assert kept.exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".apollo_tp_demo", "notes.txt"]
