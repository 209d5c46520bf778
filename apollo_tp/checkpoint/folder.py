"""What lies in a checkpoint folder, and how it appears: complete or not at all.

<checkpoint.dir>/
  <name>/                  0700; appears by one rename
    *.safetensors, config.json, tokenizer files ...   a Hugging Face folder, original names and file split
    optimizer/             state in global coordinates
    apollo_tp.json         CheckpointInfo
  latest -> <name>
  .writer.lock             held (flock) by the one trainer that writes here
  .<name>.partial/         being written, or left by a crash; removed when the next one is begun
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from apollo_tp import runtime
from apollo_tp.errors import ApolloTpError, CheckpointError, ConfigError

log = logging.getLogger(__name__)

INFO_FILE = "apollo_tp.json"
OPTIMIZER_DIR = "optimizer"
LATEST = "latest"


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was saved. ``weight_version`` counts updates since the model was first served."""

    weight_version: int
    model_path: str
    optimizer: str
    num_ranks: int
    created_at: float


def read_info(folder: Path) -> CheckpointInfo | None:
    """The record of a complete checkpoint, or None if ``folder`` is not one of ours. Raises CheckpointError for a record
    that cannot be read."""
    path = folder / INFO_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=CheckpointInfo)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: got an unreadable record ({error}), expected JSON; remove the folder") from None


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``."""
    link = root / LATEST
    return link.resolve() if link.exists() else None


@contextmanager
def writer_lock(root: Path) -> Iterator[None]:
    """Hold the one writer's place below ``root``, created if missing: what is dropped there as old, and ``latest``, are one
    model's. Raises ConfigError if another trainer has it."""

    def refuse(holder: str) -> ApolloTpError:
        return ConfigError(
            f"checkpoint.dir: got {root}, below which another trainer (process {holder}) writes, expected a folder of this "
            "one's own; set checkpoint.dir=..., or stop the other trainer"
        )

    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with runtime.locked(root / ".writer.lock", refuse):
        yield


def partial_path(root: Path, name: str) -> Path:
    """Where a checkpoint is written before it is complete. Raises CheckpointError if ``name`` is not a plain name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", name) or name == LATEST:
        raise CheckpointError(
            f"checkpoint name: got {name!r}, expected letters, digits, '_', '-', '.' and not 'latest'"
        )
    return root / f".{name}.partial"


def begin(root: Path, name: str) -> Path:
    """An empty folder to write to, alone on rank 0; what a crash or a failure left of others goes. Raises CheckpointError if
    the name is taken."""
    partial = partial_path(root, name)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (root / name).exists():
        raise CheckpointError(f"checkpoint {root / name}: got a name that is taken, expected a new one")
    for left in root.glob(".*.partial"):  # as large as a model each, and no name comes twice
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(mode=0o700)
    return partial


def complete(root: Path, name: str, keep: int, served: Path) -> Path:
    """Make the partial folder the checkpoint ``name`` and the latest one, alone on rank 0; drop the oldest, but not the
    one that is ``served``."""
    final = root / name
    fsync_tree(partial_path(root, name))
    os.rename(partial_path(root, name), final)
    link = root / f".{LATEST}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / LATEST)
    fsync(root)
    _prune(root, keep, served)
    return final


def _prune(root: Path, keep: int, served: Path) -> None:
    """Raises nothing: the newest checkpoint is complete, whatever becomes of the oldest."""
    complete_ones = []
    for folder in root.iterdir():
        try:
            if not folder.is_symlink() and (info := read_info(folder)):
                complete_ones.append((info.created_at, folder))
        except CheckpointError as error:  # lost+found, say
            log.warning("left alone: %s", error)
    for _, folder in sorted(complete_ones)[: max(0, len(complete_ones) - max(keep, 1))]:
        if folder.resolve() != served.resolve():
            shutil.rmtree(folder, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below and including ``folder``."""
    for path, _, files in os.walk(folder):
        for file in files:
            fsync(Path(path) / file)
        fsync(Path(path))
