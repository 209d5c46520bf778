"""The folder of service.state_dir: what may become it, and what is removed from it. Whatever is not ours survives."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from apollo_tp.errors import ConfigError
from tests.support.fakes import CoordinatorProcess
from tests.support.state_folder import JOB, start, with_upload, write

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


# --- which folder may become the state folder ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["files/a.txt", "samples/b.wav", f"samples/{JOB}.train", "notes.txt", ".hidden"])
def test_a_folder_with_anything_of_the_users_is_refused_untouched(folder: Path, name: str) -> None:
    write(folder / name)
    folder.chmod(0o700)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"service\.state_dir .*holds '.*new or an empty one"):
        start(folder)
    assert sorted(folder.rglob("*")) == before
    assert (folder / name).read_bytes() == b"precious"


def test_an_empty_folder_becomes_ours_and_stays_ours(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    path = with_upload(folder)
    for _ in range(2):
        start(folder)
    assert path.exists()
    assert (folder / "jobs.sqlite3").stat().st_mode & 0o777 == 0o600


def test_a_first_start_that_was_killed_is_begun_again(folder: Path) -> None:
    """After the marker, before the database has its tables."""
    folder.mkdir(mode=0o700)
    (folder / ".apollo_tp_state").touch()
    (folder / "jobs.sqlite3").touch()
    start(folder)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o750, 0o722])
def test_a_folder_that_others_may_use_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=r"service\.state_dir .*got owner.*chmod 700"):
        start(folder)
    assert not list(folder.iterdir())


@needs_root
@pytest.mark.parametrize("part", ["", "samples", "jobs.sqlite3"])
def test_what_another_user_owns_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    """Above all by root: a link in it led to a folder of root's, which was emptied."""
    start(folder)
    private = write(tmp_path / "private" / f"{JOB}.train")
    if not part:
        (folder / "samples").rmdir()
        (folder / "samples").symlink_to(private.parent)
    os.chown(folder / part, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=rf"{part}.*(owner|user) {NOBODY}"):
        start(folder)
    assert private.read_bytes() == b"precious"


@pytest.mark.parametrize("part", ["files", "samples"])
def test_a_link_in_place_of_our_folder_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    start(folder)
    private = write(tmp_path / "private" / ("0" * 64 if part == "files" else f"{JOB}.train"))
    (folder / part).rmdir()
    (folder / part).symlink_to(private.parent)
    with pytest.raises(ConfigError, match=rf"state/{part}: got a link to {private.parent}"):
        start(folder)
    assert private.read_bytes() == b"precious"


def test_a_link_in_place_of_the_state_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """The message names where it leads."""
    (tmp_path / "disk").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match=rf"got a link to .*set {tmp_path / 'disk'}"):
        start(folder)


def _dangling(folder: Path) -> None:
    folder.symlink_to(folder.with_name("gone"))


def _file(folder: Path) -> None:
    folder.write_text("mine")


def _circle(folder: Path) -> None:
    folder.symlink_to(folder)


def _below_a_file(folder: Path) -> None:
    folder.with_name("file").write_text("mine")
    folder.symlink_to(folder.with_name("file") / "state")


@pytest.mark.parametrize("make", [_dangling, _file, _circle, _below_a_file])
def test_what_is_no_folder_is_refused_with_its_name(folder: Path, make: Callable[[Path], None]) -> None:
    """No traceback."""
    make(folder)
    with pytest.raises(ConfigError, match=rf"service\.state_dir {folder}: got .*no folder"):
        start(folder)
    assert not folder.with_name("gone").exists()


@pytest.mark.parametrize("name", ["coordinator.lock", "jobs.sqlite3"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_our_files_are_not_written_through_links(
    folder: Path, tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    """The lock's file is emptied when it is taken: through a link that would be somebody's file."""
    start(folder)
    other = write(tmp_path / "other")
    (folder / name).unlink()
    link(other, folder / name)
    with pytest.raises(ConfigError, match=name):
        start(folder)
    assert other.read_bytes() == b"precious"


READ_ONLY = """
import os, sys
from pathlib import Path
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ConfigError
if os.geteuid() == 0:
    os.seteuid(int(sys.argv[2]))
try:
    Store(Path(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that another user can reach, as those of pytest are not."""
    path = Path(tempfile.mkdtemp(prefix="state_folder_"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("where", ["state", "state/new"])
def test_a_folder_that_cannot_be_written_is_refused(public: Path, where: str) -> None:
    folder = public / "state"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:  # who could write it all the same
        os.chown(folder, NOBODY, NOBODY)
    command = [sys.executable, "-c", READ_ONLY, str(public / where), str(NOBODY)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"service.state_dir {public / where}: got " in result.stdout, result.stderr


# --- what is removed from it -----------------------------------------------------------------------------------------


def test_only_what_we_wrote_and_need_no_more_is_removed_and_logged(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apollo_tp")
    uploaded = with_upload(folder)
    private = write(tmp_path / "private" / "x")
    own = [
        f"samples/{JOB}.train", f"samples/ft{JOB}.ref", f"samples/.{JOB}.valid.4711", "files/" + "0" * 64,
    ]  # fmt: skip
    foreign = [
        "samples/recording.wav", f"samples/{JOB}.train.bak", f"samples/{JOB}x.train", f"samples/.{JOB}.train.swp",
        f"samples/{JOB}", "files/thesis.tex", "files/" + "0" * 63, "files/" + "A" * 64, "files/sub/thesis.tex",
        f"files/{'0' * 64}\n", "wandb/run.log", "notes.txt",
    ]  # fmt: skip
    for name in own + foreign:
        write(folder / name)
    (folder / "samples" / f"job-{'2' * 24}.train").symlink_to(private)
    (folder / "files" / ("3" * 64)).symlink_to(private.parent)
    (folder / "files" / ("4" * 64)).mkdir()
    start(folder)
    assert not [name for name in own if (folder / name).exists()]
    assert not [name for name in foreign if (folder / name).read_bytes() != b"precious"]
    assert (folder / "samples" / f"job-{'2' * 24}.train").is_symlink()
    assert (folder / "files" / ("3" * 64)).is_symlink()
    assert (folder / "files" / ("4" * 64)).is_dir()
    assert private.read_bytes() == b"precious"
    assert uploaded.exists()
    removed = [m for m in caplog.messages if " removed: no job or file" in m and "is left alone" not in m]
    assert sorted(line.split(" removed")[0] for line in removed) == sorted(str(folder / name) for name in own)
    assert "recording.wav" in caplog.text


@needs_root
def test_another_users_file_stays(folder: Path) -> None:
    start(folder)
    path = write(folder / "samples" / f"{JOB}.train")
    os.chown(path, NOBODY, NOBODY)
    start(folder)
    assert path.exists()


def test_the_coordinator_says_why_and_ends(tmp_path: Path) -> None:
    """Status 1, not that of a full disk, after which it would be started again and again; one log line, no traceback."""
    coordinator = CoordinatorProcess(tmp_path)
    write(tmp_path / "state" / "files" / "thesis.tex")
    (tmp_path / "state").chmod(0o700)
    with pytest.raises(AssertionError):
        coordinator.start()
    assert coordinator.process.wait(10) == 1
    log = coordinator.log_path.read_text()
    assert "was not made by apollo_tp" in log
    assert "Traceback" not in log
    assert (tmp_path / "state" / "files" / "thesis.tex").exists()


# --- uploads ---------------------------------------------------------------------------------------------------------

FULL = """
import asyncio, errno, os, sys
from apollo_tp.coordinator import __main__ as coordinator
from apollo_tp.coordinator.http import bodies
from apollo_tp.coordinator.settings import load
from pathlib import Path
def full(fd): raise OSError(errno.ENOSPC, "no room")
class Full:
    def __getattr__(self, name): return full if name == "fsync" else getattr(os, name)
bodies.os = Full()
asyncio.run(coordinator.serve(load(Path(sys.argv[-1]))))
"""


def test_of_an_upload_that_fails_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when the content is flushed: the room is free again at once, not at the next start."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        "tests.support.fakes.subprocess.Popen",
        lambda command, **options: popen([sys.executable, "-c", FULL, command[-1]], **options),
    )
    with CoordinatorProcess(tmp_path, forked=False) as coordinator:
        part = {"file": ("train.jsonl", b'{"messages": []}\n')}
        answer = httpx.post(f"{coordinator.url}/v1/files", files=part, data={"purpose": "fine-tune"}, timeout=30)
        assert answer.status_code == 507
        assert not list((tmp_path / "state" / "files").iterdir())
