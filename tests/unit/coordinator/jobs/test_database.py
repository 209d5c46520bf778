"""The database of service.state_dir: another program's is refused untouched, one of an earlier release migrated."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from apollo_tp.coordinator.jobs import database
from apollo_tp.coordinator.jobs.job import JobSpec, State, StoredFile, new_job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ConfigError
from tests.support.fakes import CoordinatorProcess
from tests.support.state_folder import JOB, content_of, start, with_upload, write

VERSION_1 = """
CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL,
                   source TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX jobs_by_state ON jobs(state, seq);
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, time REAL NOT NULL,
                     level TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX events_by_job ON events(job_id, id);
CREATE TABLE idempotency (key TEXT NOT NULL, route TEXT NOT NULL, digest TEXT NOT NULL, target TEXT NOT NULL,
                          created_at REAL NOT NULL, PRIMARY KEY (route, key));
CREATE TABLE files (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, data BLOB NOT NULL);
CREATE TABLE checkpoints (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job_id TEXT NOT NULL,
                          state TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
PRAGMA user_version=1;
"""
"""What the first release wrote."""


def _version_1(folder: Path) -> Path:
    """A state folder of the first release, with a queued job and its samples, an upload, and what a crash left."""
    folder.mkdir(mode=0o700)
    for name in ("files", "samples"):
        (folder / name).mkdir(mode=0o700)
    (folder / "coordinator.lock").write_text("1")
    job = new_job("train", JobSpec(), State.queued, "m")
    job.id = JOB
    file = StoredFile(id="file-1", filename="train.jsonl", bytes=3, created_at=1.0)
    with closing(sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None)) as db:
        db.executescript(VERSION_1)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(
            "INSERT INTO jobs(id, state, source, data) VALUES (?,?,?,?)",
            (job.id, "queued", "train", msgspec.json.encode(job)),
        )
        db.execute("INSERT INTO files(id, data) VALUES (?,?)", (file.id, msgspec.json.encode(file)))
    write(folder / "samples" / f"{JOB}.train")
    write(folder / "samples" / f"job-{'1' * 24}.train")
    return write(folder / "files" / hashlib.sha256(b"file-1").hexdigest())


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _missing(path: Path) -> None:
    path.unlink()


def _no_tables(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=0")
        db.execute("VACUUM")


def _foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE jobs (name TEXT); INSERT INTO jobs VALUES ('mine'); PRAGMA user_version=1;")


def _foreign_id(path: Path) -> None:
    """Tables of our names, in another program's database, which has an application id."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA application_id=1")


def _no_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=0")


def _newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={len(database.STEPS) + 1}")


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _some_bytes(path: Path) -> None:
    os.truncate(path, 40)


def _text(path: Path) -> None:
    path.write_text("not a database\n" * 1000)


DAMAGES = {
    _empty: "an empty database next to files",
    _missing: "no database next to files",
    _no_tables: "an empty database next to files",
    _foreign: "another program's database",
    _foreign_id: "another program's database",
    _no_version: "another program's database",
    _newer: "a later version of apollo_tp wrote it: install",
    _half: "malformed",
    _some_bytes: "malformed",
    _text: "not a database",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("marked", [True, False])
def test_a_database_that_does_not_know_our_files_removes_none(
    folder: Path, damage: Callable[[Path], None], marked: bool
) -> None:
    """Nor is it written to, again and again. Without a marker, as in folders of earlier releases, too."""
    with_upload(folder)
    damage(folder / "jobs.sqlite3")
    if not marked:
        (folder / ".apollo_tp_state").unlink()
    before = content_of(folder)
    taken = damage is _newer or marked
    for _ in range(2):
        with pytest.raises(ConfigError, match=DAMAGES[damage] if taken else "was not made by apollo_tp") as caught:
            start(folder)
        assert str(folder) in str(caught.value)
    after = content_of(folder)
    assert {name: after[name] for name in before if name != "coordinator.lock"} == {
        name: content for name, content in before.items() if name != "coordinator.lock"
    }


def test_a_damaged_table_removes_nothing_and_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """The header is sound, so the damage is noticed when rows are read, which is before anything is removed."""
    path, orphan = with_upload(tmp_path / "state"), write(tmp_path / "state" / "files" / ("0" * 64))
    with closing(sqlite3.connect(tmp_path / "state" / "jobs.sqlite3")) as db:
        size = db.execute("PRAGMA page_size").fetchone()[0]
        root = db.execute("SELECT rootpage FROM sqlite_schema WHERE name='files'").fetchone()[0]
    with open(tmp_path / "state" / "jobs.sqlite3", "r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    coordinator = CoordinatorProcess(tmp_path)
    with pytest.raises(AssertionError):
        coordinator.start()
    assert coordinator.process.wait(10) == 1
    assert "corrupt" in coordinator.log_path.read_text()
    assert path.exists()
    assert orphan.exists()


# --- versions --------------------------------------------------------------------------------------------------------


def test_a_state_folder_of_the_first_release_goes_on(folder: Path) -> None:
    """Known by its database. Its jobs and files are there; the copy from before can be put back."""
    path = _version_1(folder)
    store = Store(folder)
    store.remove_orphans()
    assert [job.id for job in store.jobs(State.queued)] == [JOB]
    assert [file.id for file in store.files()] == ["file-1"]
    store.close()
    assert path.exists()
    assert [entry.name for entry in (folder / "samples").iterdir()] == [f"{JOB}.train"]
    start(folder)
    copy = folder / "jobs.sqlite3.schema1"
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT id FROM jobs").fetchall() == [(JOB,)]
    assert not list(folder.glob("*.partial"))


def test_a_migrated_database_equals_a_new_one(tmp_path: Path) -> None:
    """Tables, indices and header."""

    def schema(path: Path) -> tuple[set[tuple[str]], list[int]]:
        with closing(sqlite3.connect(path)) as db:
            sql = set(db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL"))
            return sql, [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id")]

    _version_1(tmp_path / "old")
    start(tmp_path / "old")
    start(tmp_path / "new")
    assert schema(tmp_path / "old" / "jobs.sqlite3") == schema(tmp_path / "new" / "jobs.sqlite3")
    assert schema(tmp_path / "new" / "jobs.sqlite3")[1] == [len(database.STEPS), database.APPLICATION_ID]


def test_a_step_that_fails_changes_nothing(folder: Path) -> None:
    """The second of two: the first one is undone, and the next try, with a step that works, finds the version as it was."""
    start(folder)
    path, version = folder / "jobs.sqlite3", len(database.STEPS)
    first = "ALTER TABLE jobs ADD COLUMN note TEXT NOT NULL DEFAULT 'x';"
    with pytest.raises(sqlite3.Error):
        database.open_database(
            path, may_be_new=False, steps=(*database.STEPS, first, "INSERT INTO nowhere VALUES (1);")
        )
    start(folder)
    with closing(database.open_database(path, may_be_new=False, steps=(*database.STEPS, first))) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version + 1,)
        assert db.execute("SELECT count(note) FROM jobs").fetchone() == (0,)
    with pytest.raises(ConfigError, match=f"got schema {version + 1}, expected at most {version}"):
        start(folder)


def test_without_room_for_the_copy_nothing_is_migrated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of the copy stays."""
    _version_1(folder)

    def full(path: Path) -> None:
        raise OSError(28, "no room", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("apollo_tp.coordinator.jobs.database.owned_folder.fsync", full)
        with pytest.raises(OSError, match="no room"):
            database.open_database(folder / "jobs.sqlite3", may_be_new=False)
    assert not list(folder.glob("jobs.sqlite3.*"))
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    start(folder)


def test_a_database_whose_rows_are_in_the_log_alone_is_known(folder: Path) -> None:
    """A kill before the write-ahead log is folded into the file, of which nothing but a header is there then."""
    code = "import os, sys; from pathlib import Path; from apollo_tp.coordinator.jobs.store import Store; "
    code += "Store(Path(sys.argv[1])).set_meta('a', 'b').result(9); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
    (folder / ".apollo_tp_state").unlink()
    assert (folder / "jobs.sqlite3-wal").stat().st_size
    store = Store(folder)
    assert store.get_meta("a") == "b"
    store.close()
