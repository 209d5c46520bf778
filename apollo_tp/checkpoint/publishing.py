"""What of a checkpoint is for others: its files without our own, once it is known to be complete. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from apollo_tp.checkpoint.folder import CHECKSUMS_FILE, INFO_FILE, OPTIMIZER_DIR, PARTIAL, read_checksums, read_info
from apollo_tp.errors import CheckpointError
from apollo_tp.runtime import owned_folder

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS = ".safetensors"
OWN = [INFO_FILE, CHECKSUMS_FILE, f"{OPTIMIZER_DIR}/*", ".*", "*/.*"]
"""Patterns of what stays here: our records, the optimizer state of earlier versions, and hidden files (a .gitignore of the
model's folder could make the hub leave out weights)."""
_ADVICE = "save another one (`apollo-tp checkpoint`), or copy this one again"


@dataclass(frozen=True)
class PublicFile:
    """A file by its path in the folder, and in the repository."""

    path: str
    bytes: int


def public_files(folder: Path) -> list[PublicFile]:
    """The files of the complete checkpoint in ``folder`` that are published, by name. Raises CheckpointError if it is no
    checkpoint of this project, or lacks a part."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    if owned_folder.is_marked(folder, PARTIAL):
        raise CheckpointError(f"{folder}: got a checkpoint that is not complete, expected one that is; {_ADVICE}")
    if read_info(folder) is None:
        raise CheckpointError(
            f"{folder}: got a folder without {INFO_FILE}, expected a checkpoint that apollo_tp wrote; `apollo-tp "
            "checkpoints` lists them"
        )
    _check_weights(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = filter_repo_objects(names, ignore_patterns=[*OWN, *DEFAULT_IGNORE_PATTERNS])
    return [PublicFile(name, (folder / name).stat().st_size) for name in chosen]


def replaced(present: list[str], files: list[PublicFile]) -> list[str]:
    """Of the names ``present`` in a repository, weights and their index that ``files`` do not replace: beside the new ones
    they would be loaded as a part of the model, or in its place."""
    new = {file.path for file in files}
    old = (name for name in present if "/" not in name and name not in new)
    return sorted(name for name in old if name.endswith((WEIGHTS, f"{WEIGHTS}.index.json")))


def _check_weights(folder: Path) -> None:
    """Raise CheckpointError unless the configuration, each file of the index, and each tensor that was saved are there."""
    found: set[str] = set()
    for path in sorted(folder.glob(f"*{WEIGHTS}")):
        found.update(_tensors(path))
    try:
        index = json.loads((folder / INDEX_FILE).read_bytes())["weight_map"]
        listed = {INDEX_FILE: set(index)}
    except FileNotFoundError:
        listed = {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: got {error!r}, expected a weight_map as JSON; {_ADVICE}"
        ) from None
    listed[CHECKSUMS_FILE] = set(read_checksums(folder))
    for source, names in listed.items():
        if missing := names - found:
            raise CheckpointError(
                f"{folder}: got no {owned_folder.some(missing)}, expected all tensors that {source} names; {_ADVICE}"
            )
    if not found:
        raise CheckpointError(f"{folder}: got no tensors in *{WEIGHTS}, expected the weights; {_ADVICE}")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: got no {CONFIG_FILE}, expected the model's configuration; {_ADVICE}")


def _tensors(path: Path) -> list[str]:
    """The names of the tensors in a file, whose size is that which its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: got a damaged or cut-off file ({error}), expected safetensors; {_ADVICE}"
        ) from None
