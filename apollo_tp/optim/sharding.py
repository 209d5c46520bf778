"""Projected matrices of one rank, and how their gradients meet: the four sharding cases of a tensor-parallel matrix.

The *channels* of a matrix are its larger GLOBAL dimension (rows if square); the other one is *contracted* with the random
projection. Both come from the checkpoint shape alone, never from a shard.

    cut along the channels     every rank projects its own channels completely; no matrix collective
    cut along the contracted   every rank has a partial projection of all channels: one reduce-scatter along the channels
    not cut                    every rank does the same

So the moments are always sharded along channels, (channels, rank) in fp32. A ``MatrixGroup`` lays the matrices of one
kind side by side along the channel axis, so that the moment arithmetic and each collective run once per group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig, OptimizerKind, Projection
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim.projection import gaussian, num_words, sign_words, stream_key, unpack_signs
from apollo_tp.optim.weight import Weight, range_indices

CANARY_FLOATS = 4
"""Behind what is summed by a reduce-scatter: 1 on each rank. 16 bytes, which the next block may begin on."""


def moment_rank(config: OptimConfig) -> int:
    """Rows of the projection: the configured rank, or one for APOLLO-Mini."""
    return 1 if config.kind is OptimizerKind.apollo_mini else config.rank


class Matrix:
    """A projected matrix on this rank. ``index`` is its place in the bundle.

    ``num_rows`` state rows (channels) live here; ``state_spans`` are their global channel ranges in local order, each with
    whether this rank or a replica counts it. They may hold fewer than ``num_rows`` in an exchanged matrix whose channels do
    not divide by the number of ranks.
    """

    def __init__(self, weight: Weight, config: OptimConfig, tp: TPGroup) -> None:
        shape, cut = weight.shard.global_shape, weight.shard.dim
        self.index, self.weight = weight.index, weight
        self.channel_dim = 0 if shape[0] >= shape[1] else 1
        self.num_channels, self.num_contracted = max(shape), min(shape)
        self.exchanged = tp.size > 1 and cut == 1 - self.channel_dim
        contracted = weight.shard.ranges if cut == 1 - self.channel_dim else ((0, self.num_contracted),)
        self.columns = range_indices(contracted)
        self.per_rank = -(-self.num_channels // tp.size)  # channels of a rank in an exchange, padded
        if self.exchanged:
            start = min(tp.rank * self.per_rank, self.num_channels)
            self.state_spans = ((start, min(start + self.per_rank, self.num_channels), True),)
            self.num_rows = self.per_rank
        else:
            along = cut == self.channel_dim
            self.state_spans = weight.spans if along else ((0, self.num_channels, True),)
            self.num_rows = sum(stop - start for start, stop, _ in self.state_spans)
        scale = self.num_contracted / moment_rank(config) if config.scale == "auto" else float(config.scale)
        self.root_scale = math.sqrt(scale)
        self.projection_key = stream_key(config.seed, weight.name, "projection")
        self.refresh = -1
        self.words: Tensor | None = None
        self.dense: Tensor | None = None

    def channels_first(self, local: Tensor) -> Tensor:
        """A (rows, columns) local tensor as (channels, contracted); a view."""
        return local if self.channel_dim == 0 else local.t()

    def row_counts(self) -> Tensor:
        """(num_rows,) fp32: 1 where this rank counts a channel in sums over ranks, 0 where a replica does.

        After an exchange each rank holds other channels; otherwise replicas hold the same ones and one of them counts.
        """
        if self.exchanged or self.weight.counted is None:
            return torch.full((self.num_rows,), float(self.exchanged or self.weight.represents))
        return self.weight.counted.flatten().cpu()

    def projection(self, rank: int) -> Tensor:
        """(local contracted, rank) fp32 of unit variance; the caller divides by sqrt(rank)."""
        if self.dense is not None:
            return self.dense
        assert self.words is not None  # refresh_projections ran
        return unpack_signs(self.words, rank)


def refresh_projections(matrices: Sequence[Matrix], due: Sequence[int], config: OptimConfig) -> None:
    """Bring the projection of each matrix to interval ``due[i]``: packed sign bits, all new ones in one batch.

    A few integers per contracted column stay in memory between refreshes; none are checkpointed.
    """
    rank = moment_rank(config)
    stale = [(m, refresh) for m, refresh in zip(matrices, due, strict=True) if m.refresh != refresh]
    if not stale:
        return
    device = stale[0][0].weight.data.device
    for matrix, refresh in stale:
        matrix.refresh = refresh
    if config.projection is Projection.gaussian:
        for matrix, refresh in stale:
            matrix.dense = gaussian(matrix.projection_key, refresh, matrix.columns.to(device), rank)
        return
    lengths = torch.tensor([m.columns.numel() for m, _ in stale])
    rows = torch.tensor([[*m.projection_key, refresh] for m, refresh in stale], dtype=torch.int64)
    key0, key1, refreshes = rows.repeat_interleave(lengths, dim=0).to(device).unbind(1)
    columns = torch.cat([m.columns for m, _ in stale]).to(device)
    words = sign_words((key0, key1), refreshes, columns, rank)
    for (matrix, _), part in zip(stale, words.split(lengths.tolist()), strict=True):
        matrix.words = part
        assert part.shape[1] == num_words(rank)


class MatrixGroup:
    """Matrices side by side along the channel axis: state, and the buffers of one step.

    State, LOCAL, fp32: ``exp_avg``, ``exp_avg_sq`` (rows, rank); ``moments`` if given, which another group owns. Per step:
    ``projected`` (rows, rank), the projected gradient; ``energy`` (rows,), the squared norm of each channel. ``first_row``
    is where its rows begin among those of all groups of a bundle.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        rank: int,
        exchanged: bool,
        tp: TPGroup,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.matrices, self.rank, self.exchanged, self.tp = list(matrices), rank, exchanged, tp
        self.device = matrices[0].weight.data.device
        self.lengths = [m.num_rows for m in matrices]
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        self.num_rows = sum(self.lengths)
        if moments is None:
            moments = (
                torch.zeros(self.num_rows, rank, device=self.device),
                torch.zeros(self.num_rows, rank, device=self.device),
            )
        self.exp_avg, self.exp_avg_sq = moments
        self.first_row = 0
        self.index = torch.tensor([m.index for m in matrices], device=self.device)
        self.counts = torch.cat([m.row_counts() for m in matrices]).to(self.device)
        self.segments = torch.tensor(self.lengths, device=self.device)

    def rows(self, position: int) -> slice:
        """State rows of the matrix at ``position``."""
        return slice(self.starts[position], self.starts[position] + self.lengths[position])

    def parts(self, chosen: dict[int, Matrix]) -> Iterator[MatrixGroup]:
        """Groups that share the state of some of these matrices; ``chosen`` has their stand-ins by ``index`` here."""
        places = range(len(self.matrices))
        for taken, run in itertools.groupby(places, key=lambda place: self.matrices[place].index in chosen):
            if taken:
                members = list(run)
                rows = slice(self.rows(members[0]).start, self.rows(members[-1]).stop)
                matrices = [chosen[self.matrices[place].index] for place in members]
                yield MatrixGroup(
                    matrices, self.rank, self.exchanged, self.tp, (self.exp_avg[rows], self.exp_avg_sq[rows])
                )

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """(ranks that an exchange involves, floats for each): (rank + 1) per row, projections first, then energies; in an
        exchange then the canary."""
        floats = self.num_rows * (self.rank + 1)
        return (self.tp.size, floats + CANARY_FLOATS) if self.exchanged else (1, floats)

    def use(self, flat: Tensor) -> None:
        """Use fp32 ``flat`` of ``buffer_shape`` as ``all_projected`` (ranks, rows, rank), ``all_energy`` (ranks, rows)."""
        self.flat, split = flat, self.num_rows * self.rank
        self.all_projected = flat[:, :split].unflatten(1, (self.num_rows, self.rank))
        self.all_energy = flat[:, split : split + self.num_rows]

    def exchange(self) -> None:
        """Sum the partial projections over ranks and keep the own channels. One reduce-scatter if cut contracted, and then
        ``canary`` (1,) is the number of ranks if it happened."""
        if self.exchanged:
            self.flat[:, -CANARY_FLOATS:] = 1.0
            self.use(self.tp.reduce_scatter(self.flat))
            self.canary = self.flat[0, -1:]
        self.projected, self.energy = self.all_projected[0], self.all_energy[0]

    def release(self) -> None:
        """Drop the buffers of the step."""
        del self.flat, self.all_projected, self.all_energy, self.projected, self.energy
        if self.exchanged:
            del self.canary


def make_groups(matrices: Sequence[Matrix], rank: int, tp: TPGroup, bucket_bytes: int) -> list[MatrixGroup]:
    """One group of all matrices that need no exchange, and exchange groups whose buffers stay below ``bucket_bytes``."""
    local = [m for m in matrices if not m.exchanged]
    groups = [MatrixGroup(local, rank, False, tp)] if local else []
    bucket: list[Matrix] = []
    size = 0
    for matrix in (m for m in matrices if m.exchanged):
        need = 4 * tp.size * matrix.per_rank * (rank + 1)
        if bucket and size + need > bucket_bytes:
            groups.append(MatrixGroup(bucket, rank, True, tp))
            bucket, size = [], 0
        bucket.append(matrix)
        size += need
    return [*groups, MatrixGroup(bucket, rank, True, tp)] if bucket else groups
