"""Boxes of plain tensors for torch.distributed.checkpoint: its own planners know global offsets of DTensors only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

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
        chunk = ChunkStorageMetadata(offsets=torch.Size(piece.box.offset), sizes=torch.Size(piece.box.shape))
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.global_shape))
        return WriteItem(MetadataIndex(piece.key, piece.box.offset), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, items = create_default_global_save_plan(all_plans)
        return plans, Metadata(items)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index.fqn].tensor.detach().contiguous()
