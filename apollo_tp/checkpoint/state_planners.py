"""Boxes of plain tensors for torch.distributed.checkpoint: its own planners know global offsets of DTensors only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from apollo_tp.errors import CheckpointError
from apollo_tp.optim.rounding import convert_remainder
from apollo_tp.shards.boxes import Box


@dataclass(frozen=True)
class Piece:
    """A LOCAL view that holds one global box of one key. ``owned`` on one of the ranks with the same content."""

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    part: int
    owned: bool


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.box.offset), sizes=torch.Size(piece.box.shape))


class SaveBoxes(SavePlanner):
    """Writes boxes of plain tensors at global offsets; the default planner knows global offsets of DTensors only."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = {piece.key: piece for piece in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(piece) for piece in self.pieces.values()])

    def _item(self, piece: Piece) -> WriteItem:
        properties = TensorProperties.create_from_tensor(piece.tensor)
        data = TensorWriteData(chunk=_chunk(piece), properties=properties, size=torch.Size(piece.global_shape))
        return WriteItem(MetadataIndex(piece.key, piece.box.offset), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, items = create_default_global_save_plan(all_plans)
        return plans, Metadata(items)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index.fqn].tensor.detach().contiguous()


class LoadBoxes(LoadPlanner):
    """Reads from each folder what intersects the wanted boxes, and counts the elements read."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.wanted: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.wanted.setdefault(piece.key, []).append(piece)
        self.missing = {key: sum(p.box.numel for p in pieces) for key, pieces in self.wanted.items()}
        self.stored: set[str] = set()
        self.metadata: Metadata | None = None
        self.converted: set[str] = set()

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self.stored.update(self.metadata.state_dict_metadata)
        items: list[ReadItem] = []
        for key, pieces in self.wanted.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if isinstance(stored, TensorStorageMetadata):
                dtype, want = stored.properties.dtype, pieces[0].tensor.dtype
                if dtype != want and {dtype, want} == {torch.int8, torch.int16}:
                    self.converted.add(key)
                elif dtype != want:
                    raise CheckpointError(f"{key}: got {dtype} saved, expected {want}; the file is of another version")
                items += create_read_items_for_chunk_list(key, stored, [_chunk(piece) for piece in pieces])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: got bytes, expected a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self._view(read_item)
        self.missing[read_item.dest_index.fqn] -= tensor.numel()
        if read_item.dest_index.fqn not in self.converted:
            return tensor
        return torch.empty_like(tensor, dtype=torch.int8 if tensor.dtype is torch.int16 else torch.int16)

    def _view(self, read_item: ReadItem) -> Tensor:
        """The part of a wanted tensor that this item fills."""
        position = read_item.dest_index.index
        assert position is not None
        tensor = self.wanted[read_item.dest_index.fqn][position].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The reader has copied into the view, or into a remainder of the other size."""
        if read_item.dest_index.fqn in self.converted:
            view = self._view(read_item)
            view.copy_(convert_remainder(tensor, view.dtype))

    def clear_what_nobody_saved(self) -> None:
        """Remainders that were not saved are zero."""
        for key, pieces in self.wanted.items():
            if key not in self.stored:
                for piece in pieces:
                    piece.tensor.zero_()

    def check_complete(self, folder: Path) -> None:
        """Raise CheckpointError unless every wanted element was read exactly once, but for remainders that nobody saved."""
        expected = {k: n for k, n in self.missing.items() if k in self.stored or not k.endswith(".remainder")}
        short = [f"{key} ({count} elements)" for key, count in expected.items() if count]
        if short:
            raise CheckpointError(
                f"optimizer state in {folder}: got an incomplete set of files, expected {len(expected)} tensors; "
                f"missing of {len(short)}: {', '.join(short[:3])}; copy all rank-* folders or use optim.reset_state=true"
            )
