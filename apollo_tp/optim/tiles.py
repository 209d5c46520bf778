"""Tables that tell a Triton kernel which tile of which tensor a program works on. See ``triton_backend``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_tp.optim.weight import Weight


@dataclass
class Launch:
    """Tiles that share a compiled kernel. ``options`` are its constants; ``table`` and ``tiles`` lie on the device."""

    options: dict[str, Any]
    table: Tensor
    tiles: list[Tensor]
    owners: list[int]
    """Index of the parameter behind each row of the table."""
    offsets: list[int]
    """Bytes from the start of the parameter's gradient to each row's."""
    addresses: Tensor
    distinct: Tensor
    """The parameters of ``owners``, each once, int64."""
    tile_counts: Tensor
    """Tiles of each of them: neighbours in ``tiles``, since a parameter's rows follow each other."""

    @property
    def grid(self) -> tuple[int]:
        return (self.tiles[0].numel(),)


@dataclass
class Row:
    """One row of a table before it is one: its tensor's extent and the tile that a program takes of it."""

    options: dict[str, Any]
    entry: list[int]
    extent: tuple[int, ...]
    tile: tuple[int, ...]
    owner: int
    offset: int


@dataclass
class Piece:
    """A part of a local (rows, columns) weight whose global rows and columns are contiguous."""

    weight: Weight
    row: int
    column: int
    rows: int
    columns: int
    global_row: int
    global_column: int


def pieces(weight: Weight) -> Iterator[Piece]:
    """The local weight, cut where its global rows or columns jump."""
    shape, shard = weight.shard.global_shape, weight.shard
    rows, columns = weight.local_2d
    if shard.dim is None:
        yield Piece(weight, 0, 0, rows, columns, 0, 0)
        return
    local = 0
    for start, stop in shard.ranges:
        length = stop - start
        if shard.dim == len(shape) - 1:
            yield Piece(weight, 0, local, rows, length, 0, start)
        else:  # each index before the cut dimension has its own run of rows
            inner = math.prod(shape[shard.dim + 1 : -1])
            for outer in range(math.prod(shape[: shard.dim])):
                row = (outer * shard.local_shape[shard.dim] + local) * inner
                global_row = (outer * shape[shard.dim] + start) * inner
                yield Piece(weight, row, 0, length * inner, columns, global_row, 0)
        local += length


def aligned(tensor: Tensor) -> bool:
    """True if every row of a (rows, columns) tensor starts on 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def make_launches(rows: Iterator[Row], device: torch.device, dims: int) -> list[Launch]:
    """Rows with equal constants share a launch; every row is cut into tiles."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if math.prod(row.extent):
            grouped.setdefault(tuple(sorted(row.options.items(), key=lambda item: item[0])), []).append(row)
    launches = []
    for same in grouped.values():
        tiles: list[Tensor] = []
        for i, row in enumerate(same):
            starts = [torch.arange(0, n, step, dtype=torch.int32) for n, step in zip(row.extent, row.tile, strict=True)]
            grid = torch.cartesian_prod(*starts).view(-1, dims)
            tiles.append(torch.cat([torch.full((len(grid), 1), i, dtype=torch.int32), grid], dim=1))
        columns = [c.contiguous() for c in torch.cat(tiles).to(device).unbind(1)]
        table = torch.tensor([row.entry for row in same], dtype=torch.int64).to(device)
        owners, offsets = [row.owner for row in same], [row.offset for row in same]
        counts: dict[int, int] = {}
        for owner, part in zip(owners, tiles, strict=True):
            counts[owner] = counts.get(owner, 0) + len(part)
        distinct, tile_counts = (torch.tensor(list(x)).to(device) for x in (counts.keys(), counts.values()))
        launches.append(Launch(same[0].options, table, columns, owners, offsets, table[:, 0], distinct, tile_counts))
    return launches
