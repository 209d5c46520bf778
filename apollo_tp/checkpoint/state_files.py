"""The files of an optimizer's state, as torch.distributed.checkpoint writes them: boxes of tensors at global offsets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apollo_tp.checkpoint.open_file import READ_ERRORS, OpenFile
from apollo_tp.checkpoint.state_planners import Piece
from apollo_tp.checkpoint.transfers import Transfers, rows_of
from apollo_tp.errors import CheckpointError
from apollo_tp.shards.boxes import Box

SHARDS = "DCP_SHARDING_INFO"
"""The entry of a file's metadata with the offset of each of its tensors."""
REMAINDERS = {torch.int8, torch.int16}


@dataclass(frozen=True)
class _Stored:
    file: OpenFile
    box: Box
    dtype: torch.dtype


class StateFiles:
    """What all ranks have written below ``folder``. The files stay open, so what was checked is what is loaded.

    Raises CheckpointError if one cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stored = folder, dict[str, list[_Stored]]()
        for path in sorted(folder.glob("rank-*.part-*/*.safetensors")):
            try:
                file = OpenFile(path)
                offsets = json.loads(file.metadata[SHARDS])
                for key in file:
                    dtype, shape = file.form(key)
                    box = Box(tuple(offsets[key]["saved_offsets"]), shape)
                    self._stored.setdefault(key, []).append(_Stored(file, box, dtype))
            except READ_ERRORS as error:
                raise self._unreadable(f"{path.relative_to(folder)}: {type(error).__name__}: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def read(self, pieces: Iterable[Piece], transfers: Transfers, action: Callable[[Piece, Box, Tensor], None]) -> None:
        """Call ``action`` in threads with each piece, each box of it that is stored (some megabytes, in global coordinates)
        and its values on the device. Raises CheckpointError unless every element of the pieces is stored once, but for
        remainders, which may be missing as a whole, and what ``action`` raises."""

        def run(part: tuple[Piece, _Stored, Box]) -> None:
            action(part[0], part[2], self._values(*part, transfers))

        missing: dict[str, int] = {}
        for _ in transfers.run(run, self._parts(pieces, missing)):
            pass
        short = [f"{key} ({count} elements)" for key, count in missing.items() if count]
        if short:
            raise CheckpointError(
                f"optimizer state in {self._folder}: got an incomplete set of files, expected {len(missing)} tensors; "
                f"missing of {len(short)}: {', '.join(short[:3])}; copy all rank-* folders or use optim.reset_state=true"
            )

    def _parts(self, pieces: Iterable[Piece], missing: dict[str, int]) -> Iterator[tuple[Piece, _Stored, Box]]:
        """What of the files is in the pieces; ``missing`` counts the elements that are not."""
        for piece in pieces:
            stored = self._stored.get(piece.key, [])
            if stored or not piece.key.endswith(".remainder"):
                missing[piece.key] = missing.get(piece.key, 0) + piece.box.numel
            for each in stored:
                want = piece.tensor.dtype
                if each.dtype != want and {each.dtype, want} != REMAINDERS:
                    raise CheckpointError(
                        f"{piece.key}: got {each.dtype} saved, expected {want}; the file is of another version"
                    )
                if (common := piece.box.intersection(each.box)) is not None:
                    missing[piece.key] -= common.numel
                    for box in rows_of(common, each.dtype.itemsize):
                        yield piece, each, box

    def _values(self, piece: Piece, stored: _Stored, box: Box, transfers: Transfers) -> Tensor:
        try:
            local = Box(tuple(o - first for o, first in zip(box.offset, stored.box.offset, strict=True)), box.shape)
            return transfers.read(stored.file, piece.key, local)
        except READ_ERRORS as error:
            raise self._unreadable(f"{piece.key}: {type(error).__name__}: {error}") from error

    def _unreadable(self, got: str) -> CheckpointError:
        return CheckpointError(f"optimizer state in {self._folder}: got {got}, expected a file that can be read")
