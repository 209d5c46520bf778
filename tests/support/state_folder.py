"""Folders of service.state_dir as the coordinator leaves them, and what is in them."""

from __future__ import annotations

import os
from pathlib import Path

from apollo_tp.coordinator.jobs.job import StoredFile
from apollo_tp.coordinator.jobs.store import Store

JOB = "job-" + "0" * 24


def start(folder: Path) -> None:
    """Open, clean and close the state folder, as the coordinator does at its start."""
    store = Store(folder)
    try:
        store.remove_orphans()
    finally:
        store.close()


def content_of(folder: Path) -> dict[str, bytes | str]:
    """All files and links below ``folder``."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def write(path: Path, content: bytes = b"precious") -> Path:
    """Write a file in a private folder, and return its path."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def with_upload(folder: Path) -> Path:
    """A state folder with one uploaded file, whose path this returns."""
    store = Store(folder)
    file = StoredFile(id="file-1", filename="train.jsonl", bytes=3, created_at=1.0)
    path = write(store.file_path(file.id), b"{}\n")
    store.add_file(file)
    store.close()
    return path
