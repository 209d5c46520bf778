"""Tables that tell a Triton kernel which tile of which tensor a program works on, and their launches.

A table has one row (int64 ``entry``) per tensor or contiguous piece of one. Rows with equal compile-time constants share a
launch, which has one program per tile. Made once; see ``triton_backend``. Columns, addresses in bytes, the rest in elements:

    project_kernel                  write_kernel, adamw_kernel
    0  channels                     0  index of the parameter
    1  contracted elements          1  rows                       2  columns of the piece
    2  row stride of the gradient   3  address of the weight      4  its row stride
    3  first row of the projection  5  row stride of the gradient
    4  channels per block           6  address of the remainder   7  its row stride
    5  start of the projection      8  to 11: of matrices start of the scales, channels per block, block stride, first
    6  start of the energies           channel; of AdamW addresses of both moments, their row stride, nothing
    7  block stride                 12 global row                13  global column    14  key of the random bits
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from apollo_tp.config import Precision
from apollo_tp.optim.parameters import AdamWState, Weight
from apollo_tp.optim.sharding import MatrixGroup

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass
class Launch:
    """Tiles that share a compiled kernel. ``options`` are its constants. On the device: ``table``, ``tiles`` (int32 [tiles]
    each: row of the table, then the first element along each dimension), and ``addresses`` (int64 [rows of the table]) of
    the gradients, which are set for each step. ``owners``: index of the parameter of each row of the table; ``offsets``:
    bytes from the start of that parameter's gradient. ``distinct`` (int64): the parameters of ``owners``, each once, and
    ``tile_counts`` the tiles of each: neighbours in ``tiles``, since a parameter's rows follow each other.
    """

    options: dict[str, Any]
    table: Tensor
    tiles: list[Tensor]
    owners: list[int]
    offsets: list[int]
    addresses: Tensor
    distinct: Tensor
    tile_counts: Tensor

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        return (self.tiles[0].numel(),)


@dataclass
class Row:
    """One row of a table before it is one: its tensor's extent, and the tile that a program takes of it."""

    options: dict[str, Any]
    entry: list[int]
    extent: tuple[int, ...]
    tile: tuple[int, ...]
    owner: int
    offset: int


@dataclass
class Piece:
    """A part of a local weight [R, C] whose global rows and columns are contiguous: where it begins and its size."""

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
        yield Piece(0, 0, rows, columns, 0, 0)
        return
    local = 0
    for start, stop in shard.ranges:
        length = stop - start
        if shard.dim == len(shape) - 1:
            yield Piece(0, local, rows, length, 0, start)
        else:  # each index before the cut dimension has its own run of rows
            inner = math.prod(shape[shard.dim + 1 : -1])
            for outer in range(math.prod(shape[: shard.dim])):
                row = (outer * shard.local_shape[shard.dim] + local) * inner
                global_row = (outer * shape[shard.dim] + start) * inner
                yield Piece(row, 0, length * inner, columns, global_row, 0)
        local += length


def make_launches(rows: Iterator[Row], device: torch.device, dims: int) -> list[Launch]:
    """One launch for all rows with equal constants; every row is cut into tiles. ``dims``: dimensions of the tiles."""
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


def project_rows(
    groups: Sequence[MatrixGroup],
    buffer_starts: Sequence[int],
    gradients: Sequence[Tensor],
    tile: int,
    exact_in_bf16: bool,
) -> Iterator[Row]:
    """One row per matrix that this rank projects. ``buffer_starts``: where each group's buffer begins in the common one;
    ``tile``: channels per program; ``exact_in_bf16``: bf16 gradients are multiplied as such."""
    first_projection = 0
    for group, start in zip(groups, buffer_starts, strict=False):
        block_stride = group.buffer_shape[1] if group.exchanged else 0
        for member in group.members:
            matrix, gradient, projection_start = member.matrix, gradients[member.index], first_projection
            first_projection += matrix.columns.numel()
            if not matrix.projects_here:
                continue
            channels, contracted = matrix.channels_first(gradient).shape
            first = member.rows.start
            entry = [
                channels,
                contracted,
                gradient.stride(0),
                projection_start,
                matrix.num_rows if group.exchanged else max(1, channels),
                start + first * group.rank,
                start + group.num_rows * group.rank + first,
                block_stride,
            ]
            options = {
                "CHANNELS_LAST": matrix.channel_dim == 1,
                "EVEN": channels % 16 == 0 and contracted % 16 == 0 and _aligned(gradient),
                "WIDE": not (gradient.dtype is torch.bfloat16 and exact_in_bf16),
                "G_TYPE": _TYPES[gradient.dtype],
            }
            yield Row(options, entry, (channels,), (tile,), member.index, 0)


def write_rows(
    groups: Sequence[MatrixGroup], gradients: Sequence[Tensor], tiles: Mapping[bool, tuple[int, int]]
) -> Iterator[Row]:
    """One row per piece of a projected matrix. ``tiles``: rows by columns of a program, without and with a remainder."""
    local_start = exchanged_start = 0
    exchanged_rows = sum(g.num_rows for g in groups if g.exchanged)
    local_rows = sum(g.num_rows for g in groups if not g.exchanged)
    for group in groups:
        for member in group.members:
            matrix, first = member.matrix, member.rows.start
            if group.exchanged:
                scale = [local_rows + exchanged_start + first, matrix.per_rank, exchanged_rows + 1]  # and a canary
            else:
                scale = [local_start + first, max(1, matrix.num_rows), 0]
            for piece in pieces(matrix.weight):
                channel0 = piece.row if matrix.channel_dim == 0 else piece.column
                options = {"CHANNELS_LAST": matrix.channel_dim == 1}
                yield _row(member.index, matrix.weight, piece, gradients, [*scale, channel0], options, tiles)
        if group.exchanged:
            exchanged_start += group.num_rows
        else:
            local_start += group.num_rows


def adamw_rows(
    adamw: Mapping[int, AdamWState], gradients: Sequence[Tensor], tiles: Mapping[bool, tuple[int, int]]
) -> Iterator[Row]:
    """One row per piece of an AdamW parameter."""
    for index, state in adamw.items():
        columns = state.weight.local_2d[1]
        for piece in pieces(state.weight):
            skip = 4 * (piece.row * columns + piece.column)
            moments = [state.exp_avg.data_ptr() + skip, state.exp_avg_sq.data_ptr() + skip, columns, 0]
            yield _row(index, state.weight, piece, gradients, moments, {}, tiles)


def _row(
    index: int,
    weight: Weight,
    piece: Piece,
    gradients: Sequence[Tensor],
    own: list[int],
    options: dict[str, Any],
    tiles: Mapping[bool, tuple[int, int]],
) -> Row:
    """A row for ``write_kernel`` or ``adamw_kernel``, whose ``own`` four columns are 8 to 11."""
    gradient, data, rest = gradients[index], weight.data, weight.remainder
    skip = piece.row * data.stride(0) + piece.column
    rest_skip = piece.row * weight.local_2d[1] + piece.column
    key = weight.rounding_key[0] | weight.rounding_key[1] << 32
    entry = [
        index,
        piece.rows,
        piece.columns,
        data.data_ptr() + skip * data.element_size(),
        data.stride(0),
        gradient.stride(0),
        0 if rest is None else rest.data_ptr() + rest_skip * rest.element_size(),
        weight.local_2d[1],
        *own,
        piece.global_row,
        piece.global_column,
        key - (1 << 64) if key >> 63 else key,
    ]
    # 16 elements: the remainder is one or two bytes each
    widths = (piece.column, piece.columns, piece.global_column, weight.local_2d[1])
    bf16, remainder = data.dtype is torch.bfloat16, 0 if rest is None else 8 * rest.element_size()
    options = options | {
        "EVEN": _aligned(data) and _aligned(gradient) and all(width % 16 == 0 for width in widths),
        "REMAINDER": remainder,
        "STOCHASTIC": bf16 and weight.precision is Precision.stochastic,
        "W_TYPE": _TYPES[data.dtype],
        "G_TYPE": _TYPES[gradient.dtype],
    }
    offset = (piece.row * gradient.stride(0) + piece.column) * gradient.element_size()
    return Row(options, entry, (piece.rows, piece.columns), tiles[remainder > 0], index, offset)


def _aligned(tensor: Tensor) -> bool:
    """True if every row of a [R, C] tensor starts on 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
