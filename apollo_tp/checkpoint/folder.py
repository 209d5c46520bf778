"""The layout of the checkpoints' folder. A checkpoint appears in it complete or not at all.

<checkpoint.dir>/
  <name>/                  0700; appears by one rename; what `apollo-tp push` uploads, without our records (publishing.py)
    *.safetensors, config.json, tokenizer files ...   a Hugging Face folder, with the original names and file split
    README.md              the model card
    apollo_tp.json         CheckpointInfo
    apollo_tp.checksums.json   by tensor, the checksum of its values (checksum.py)
  <name>.optimizer/        optimizer state in global coordinates (earlier versions: <name>/optimizer); appears before <name>/
  latest -> <name>
  .writer.lock             held (flock) by the one trainer that writes here
  .<name>.partial/         being written or removed, or left by a crash (.apollo_tp_partial in it says so); gone when the
                           next one is begun
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from apollo_tp.checkpoint.card import Trained, public_name
from apollo_tp.errors import DECODE_ERRORS, ApolloTpError, CheckpointError, ConfigError
from apollo_tp.runtime import owned_folder, private_files
from apollo_tp.runtime.owned_folder import fsync as fsync

log = logging.getLogger(__name__)

INFO_FILE = "apollo_tp.json"
CHECKSUMS_FILE = "apollo_tp.checksums.json"
OPTIMIZER_DIR = "optimizer"
LATEST = "latest"
PARTIAL = "partial"
"""The kind of our folders that are not yet, or no longer, checkpoints."""


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was saved. ``weight_version`` counts updates since the model was first served. Models are named by
    ``card.public_name``: the folder may be given to others. Records of older versions have paths."""

    weight_version: int
    model_path: str
    optimizer: str
    num_ranks: int
    created_at: float
    origin: str = ""
    """The model that training began from, however many checkpoints ago. Empty in records of older versions."""
    name: str = ""
    """The folder's own: a copy under another name is not ours to remove. Empty in records of older versions."""
    trained: Trained = Trained()
    """What the weights were trained on since ``origin``. Zeros in records of older versions."""


def read_info(folder: Path) -> CheckpointInfo | None:
    """The record of a complete checkpoint, or None if ``folder`` was not written by this project. Raises CheckpointError for
    a record that cannot be read."""
    path = folder / INFO_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=CheckpointInfo)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, *DECODE_ERRORS) as error:
        raise CheckpointError(f"{path}: got an unreadable record ({error}), expected JSON; remove the folder") from None


def read_checksums(folder: Path) -> dict[str, str]:
    """By tensor, the checksum with which it was written; empty for checkpoints of earlier versions. Raises CheckpointError
    for a file that cannot be read."""
    path = folder / CHECKSUMS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, *DECODE_ERRORS) as error:
        raise CheckpointError(f"{path}: got {error}, expected checksums as JSON; restore another checkpoint") from None


def origin_of(model_path: str) -> str:
    """The model that the checkpoint ``model_path`` was trained from; ``model_path`` itself if it is no checkpoint of this
    project. Raises CheckpointError for a record that cannot be read."""
    info = read_info(Path(model_path))
    return (info.origin or info.model_path) if info else model_path


def optimizer_folder(checkpoint: Path) -> Path:
    """Where the optimizer state of ``checkpoint`` is: beside it, or within it, where earlier versions wrote it."""
    beside, within = beside_of(checkpoint), checkpoint / OPTIMIZER_DIR
    return beside if beside.is_dir() or not within.is_dir() else within


def beside_of(checkpoint: Path) -> Path:
    """The folder beside ``checkpoint`` for its optimizer state."""
    return checkpoint.with_name(f"{checkpoint.name}.optimizer")


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``."""
    link = root / LATEST
    return link.resolve() if link.exists() else None


@contextmanager
def writer_lock(root: Path) -> Iterator[None]:
    """Be the one trainer that writes below ``root`` within the context; creates the folder if it is missing. ``latest`` and
    what a crash left belong to one trainer. Raises ConfigError if another trainer writes there."""

    def refuse(holder: str) -> ApolloTpError:
        return ConfigError(
            f"checkpoint.dir: got {root}, below which another trainer (process {holder}) writes, expected a folder of this "
            "one's own; set checkpoint.dir=..., or stop the other trainer"
        )

    owned_folder.make_folder(root, "checkpoint.dir")
    with private_files.locked(root / ".writer.lock", refuse):
        yield


def partial_path(root: Path, name: str) -> Path:
    """Where a checkpoint is written before it is complete. Raises CheckpointError if ``name`` is not a plain name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", name) or name == LATEST:
        raise CheckpointError(
            f"checkpoint name: got {name!r}, expected letters, digits, '_', '-', '.' and not 'latest'"
        )
    return root / f".{name}.partial"


def begin(root: Path, name: str) -> Path:
    """Make an empty folder to write to, and remove what crashes and failures left of others. On rank 0 only. Raises
    CheckpointError if the name is taken, or if ``latest`` is not ours."""
    partial = partial_path(root, name)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (root / name).exists():
        raise CheckpointError(f"checkpoint {root / name}: got a name that is taken, expected a new one")
    link = root / LATEST
    if os.path.lexists(link) and (not link.is_symlink() or "/" in os.readlink(link)):
        raise CheckpointError(
            f"{link}: got what apollo_tp did not make, expected nothing or its own link; move it away"
        )
    for left in root.glob(".*.partial"):  # as large as a model each, and no name comes twice
        why, optimizer = "not complete, or no longer a checkpoint", beside_of(root / left.name[1 : -len(".partial")])
        if owned_folder.is_marked(left, PARTIAL) and not owned_folder.remove_tree(optimizer, why, OPTIMIZER_DIR):
            continue  # by what is left it is known as ours the next time
        owned_folder.remove_tree(left, why, PARTIAL)
    if os.path.lexists(beside_of(root / name)):
        raise CheckpointError(f"{beside_of(root / name)}: got a name that is taken, expected a new one; move it away")
    partial.mkdir(mode=0o700)
    owned_folder.mark(partial, PARTIAL)
    return partial


def discard(root: Path, name: str) -> None:
    """Remove what ``begin`` made, if it did and it was not completed. Raises nothing."""
    partial, why = partial_path(root, name), "it was not completed"
    if partial.exists() and owned_folder.remove_tree(beside_of(root / name), why, OPTIMIZER_DIR):
        owned_folder.remove_tree(partial, why, PARTIAL)


def complete(
    root: Path, name: str, info: CheckpointInfo, keep: int, served: Callable[[], Collection[Path]] = tuple
) -> Path:
    """Rename the partial folder to checkpoint ``name`` and let ``latest`` point to it; then remove the oldest checkpoints of
    the same model beyond ``keep``, but none that is ``served`` now. On rank 0 only.

    Everything is flushed to disk before it is renamed. The new checkpoint's time is after that of all others, even if the
    clock went back. Raises OSError if something could not be written.
    """
    partial, final = partial_path(root, name), root / name
    others = _complete_ones(root)
    newest = max((other.created_at for other in others.values()), default=0.0)
    info = msgspec.structs.replace(
        info,
        created_at=max(info.created_at, newest + 0.001),
        name=name,
        origin=public_name(info.origin),
        model_path=public_name(info.model_path),
    )
    with os.fdopen(os.open(partial / INFO_FILE, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(info), indent=2))
    fsync_tree(partial)
    if (state := partial / OPTIMIZER_DIR).is_dir():
        owned_folder.mark(state, OPTIMIZER_DIR)
        fsync(state)
        os.rename(state, beside_of(final))
    os.rename(partial, final)
    owned_folder.marker(final, PARTIAL).unlink(missing_ok=True)
    fsync(final)
    link = root / f".{LATEST}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / LATEST)
    fsync(root)
    ours = sorted(
        (other.created_at, path)
        for path, other in others.items()
        if _same_model(other, info) and other.name in ("", path.name)
    )
    _prune([path for _, path in ours[: max(0, len(ours) + 1 - max(keep, 1))]], served, info.origin, keep)
    return final


def _prune(old: list[Path], served: Callable[[], Collection[Path]], origin: str, keep: int) -> None:
    """Remove the ``old`` checkpoints that no live server was started from. Raises nothing, as ``_remove``."""
    try:
        needed = {path.resolve() for path in served()} if old else set()
    except (ApolloTpError, OSError) as error:
        log.warning("no checkpoint removed, since it is unknown what is served: %s", error)
        return
    for path in old:
        if path.resolve() not in needed:
            _remove(path, f"checkpoint.keep={keep}, and there are newer ones of {origin}")


def _complete_ones(root: Path) -> dict[Path, CheckpointInfo]:
    """The complete checkpoints below ``root`` with their records. Folders that cannot be read are skipped with a warning."""
    found = {}
    for folder in root.iterdir():
        try:
            if not folder.name.startswith(".") and not folder.is_symlink() and (info := read_info(folder)):
                found[folder] = info
        except CheckpointError as error:  # for example lost+found
            log.warning("left alone: %s", error)
    return found


def _same_model(other: CheckpointInfo, new: CheckpointInfo) -> bool:
    """Whether a checkpoint is of the same model. Others may not be removed, nor those whose model is unknown."""
    if other.origin:
        return public_name(other.origin) == new.origin
    return public_name(other.model_path) == new.model_path


def _remove(folder: Path, why: str) -> None:
    """Remove a checkpoint, first renaming it to a partial one, which ``begin`` removes if this process is killed meanwhile.
    Raises nothing: the newest checkpoint is complete even if the oldest cannot be removed."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        owned_folder.mark(folder, PARTIAL)
        os.rename(folder, partial)
    except OSError as error:
        log.warning("%s could not be removed (%s): %s", folder, why, error)
        return
    if owned_folder.remove_tree(beside_of(folder), why, OPTIMIZER_DIR):
        owned_folder.remove_tree(partial, why, PARTIAL, shown=folder)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below and including ``folder``."""
    for path, _, files in os.walk(folder):
        for file in files:
            fsync(Path(path) / file)
        fsync(Path(path))
