"""Projected matrices of one rank, and how their gradients meet: the four sharding cases of a tensor-parallel matrix.

The *channels* of a matrix are its larger GLOBAL dimension (rows if square); the other one is *contracted* with the random
projection. Both come from the checkpoint shape alone, never from a shard.

    cut along the channels     every rank projects its own channels completely; no matrix collective
    cut along the contracted   every rank has a partial projection of all channels: one reduce-scatter along the channels
    not cut                    every rank does the same

So the moments are always sharded along channels, [channels_local, r] in fp32. A ``MatrixGroup`` concatenates the matrices
of one kind along the channel axis, so that the moment arithmetic and each collective run once per group. The records at the
end carry what a step is decided from, and the decision.

Letters of shapes: r projection rank, P ranks of the tensor-parallel group, R rows of moments of a group, N parameters of an
update group (which number matrices and AdamW's parameters together: the *index* of a parameter is its number there).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig, OptimizerKind, Projection
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim.parameters import Weight, range_indices
from apollo_tp.optim.projection import gaussian, num_words, sign_words, stream_key, unpack_signs

CANARY_FLOATS = 4
"""Floats after what is summed by a reduce-scatter: 1 on each rank. 16 bytes, which the next block may begin on."""


def moment_rank(config: OptimConfig) -> int:
    """r: rows of the projection; the configured rank, or one for APOLLO-Mini."""
    return 1 if config.kind is OptimizerKind.apollo_mini else config.rank


class Matrix:
    """A projected matrix on this rank.

    ``columns`` (int64): the global numbers of the contracted elements that this rank holds. ``num_rows``: rows of moments
    (channels) that live here. ``state_ranges``: their global channel ranges (start, stop, owned) in local order; in an
    exchanged matrix whose channels do not divide by P they may be fewer than ``num_rows``. ``exchanged``: cut along the
    contracted dimension, so that partial projections are summed over ranks.
    """

    def __init__(self, weight: Weight, config: OptimConfig, tp: TPGroup) -> None:
        shape, cut = weight.shard.global_shape, weight.shard.dim
        self.weight = weight
        self.channel_dim = 0 if shape[0] >= shape[1] else 1
        self.num_channels, self.num_contracted = max(shape), min(shape)
        self.exchanged = tp.size > 1 and cut == 1 - self.channel_dim
        contracted = weight.shard.ranges if cut == 1 - self.channel_dim else ((0, self.num_contracted),)
        self.columns = range_indices(contracted)
        self.per_rank = -(-self.num_channels // tp.size)  # channels of a rank in an exchange, padded
        if self.exchanged:
            start = min(tp.rank * self.per_rank, self.num_channels)
            self.state_ranges = ((start, min(start + self.per_rank, self.num_channels), True),)
            self.num_rows = self.per_rank
        else:
            along = cut == self.channel_dim
            self.state_ranges = weight.owned_ranges if along else ((0, self.num_channels, True),)
            self.num_rows = sum(stop - start for start, stop, _ in self.state_ranges)
        scale = self.num_contracted / moment_rank(config) if config.scale == "auto" else float(config.scale)
        self.root_scale = math.sqrt(scale)
        self.projection_key = stream_key(config.seed, weight.name, "projection")
        self.refresh = -1
        self.words: Tensor | None = None
        self.dense: Tensor | None = None

    @property
    def projects_here(self) -> bool:
        """Whether this rank projects its gradient; where partial projections are summed, one of several replicas does."""
        return not self.exchanged or self.weight.is_owner

    def channels_first(self, local: Tensor) -> Tensor:
        """A local [R, C] tensor as [channels, contracted]; a view."""
        return local if self.channel_dim == 0 else local.t()

    def row_ownership(self) -> Tensor:
        """fp32 [num_rows] on the CPU: 1 where this rank owns a channel in sums over ranks, 0 where another one does.

        After an exchange each rank holds other channels; otherwise replicas hold the same ones and one of them owns them.
        """
        if self.exchanged or self.weight.ownership_mask is None:
            return torch.full((self.num_rows,), float(self.exchanged or self.weight.is_owner))
        return self.weight.ownership_mask.flatten().cpu()

    def projection(self, rank: int) -> Tensor:
        """fp32 [contracted_local, r] of unit variance; the caller divides by sqrt(r)."""
        if self.dense is not None:
            return self.dense
        assert self.words is not None  # refresh_projections ran
        return unpack_signs(self.words, rank)


def refresh_projections(matrices: Sequence[Matrix], due: Sequence[int], config: OptimConfig) -> None:
    """Bring the projection of each matrix to interval ``due[i]``: packed sign bits, all new ones in one batch.

    A few integers per contracted column stay in memory between refreshes; none are checkpointed. No collective.
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


@dataclass(frozen=True)
class Member:
    """A matrix of a ``MatrixGroup``: its index in the update group, and its rows of the group's moments."""

    index: int
    matrix: Matrix
    rows: slice


class MatrixGroup:
    """Matrices concatenated along the channel axis: their moments, and the buffers of one step. All local.

    Moments, fp32: ``exp_avg``, ``exp_avg_sq`` [R, r]; those of ``moments`` if given, which another group allocated. Per
    step, fp32: ``projected`` [R, r], the projected gradient; ``energy`` [R], the squared norm of each channel. Constant, on
    the device: ``index`` (int64) of each member, ``lengths`` (int64), rows of each member, ``row_ownership`` (fp32 [R]).
    ``first_row`` is where the group's rows begin among those of all groups of an update group, which sets it.
    """

    def __init__(
        self,
        matrices: Mapping[int, Matrix],
        rank: int,
        exchanged: bool,
        tp: TPGroup,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``matrices`` by index, in the order of their rows."""
        self.rank, self.exchanged, self.tp, self.first_row = rank, exchanged, tp, 0
        ends = list(itertools.accumulate(m.num_rows for m in matrices.values()))
        self.members = [
            Member(i, m, slice(end - m.num_rows, end)) for (i, m), end in zip(matrices.items(), ends, strict=True)
        ]
        self.num_rows = ends[-1]
        self.device = self.members[0].matrix.weight.data.device
        if moments is None:
            first, second = (torch.zeros(self.num_rows, rank, device=self.device) for _ in range(2))
            moments = first, second
        self.exp_avg, self.exp_avg_sq = moments
        self.index = torch.tensor(list(matrices), device=self.device)
        self.lengths = torch.tensor([m.num_rows for m in matrices.values()], device=self.device)
        self.row_ownership = torch.cat([m.row_ownership() for m in matrices.values()]).to(self.device)

    def subsets(self, new_index: Mapping[int, int]) -> Iterator[MatrixGroup]:
        """Groups that share the moments of those members that ``new_index`` numbers, one for each run of neighbours."""
        for taken, run in itertools.groupby(self.members, key=lambda member: member.index in new_index):
            if taken:
                members = list(run)
                rows = slice(members[0].rows.start, members[-1].rows.stop)
                matrices = {new_index[member.index]: member.matrix for member in members}
                moments = self.exp_avg[rows], self.exp_avg_sq[rows]
                yield MatrixGroup(matrices, self.rank, self.exchanged, self.tp, moments)

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """(ranks that an exchange involves, floats for each): r + 1 per row, projections first, then energies; in an
        exchange then the canary."""
        floats = self.num_rows * (self.rank + 1)
        return (self.tp.size, floats + CANARY_FLOATS) if self.exchanged else (1, floats)

    def use(self, flat: Tensor) -> None:
        """Use fp32 ``flat`` of ``buffer_shape`` as ``all_projected`` [ranks, R, r] and ``all_energy`` [ranks, R]."""
        self.flat, split = flat, self.num_rows * self.rank
        self.all_projected = flat[:, :split].unflatten(1, (self.num_rows, self.rank))
        self.all_energy = flat[:, split : split + self.num_rows]

    def exchange(self) -> None:
        """Sum the partial projections over ranks and keep the own channels.

        Collective: one reduce-scatter if the group is exchanged, and then ``canary`` (fp32 [1]) is P if it happened.
        """
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


def make_groups(matrices: Mapping[int, Matrix], rank: int, tp: TPGroup, bucket_bytes: int) -> list[MatrixGroup]:
    """One group of all matrices that need no exchange, then exchanged groups whose buffers stay below ``bucket_bytes``, but
    for a single matrix that is larger."""
    local = {i: m for i, m in matrices.items() if not m.exchanged}
    groups = [MatrixGroup(local, rank, False, tp)] if local else []
    bucket: dict[int, Matrix] = {}
    size = 0
    for index, matrix in matrices.items():
        if not matrix.exchanged:
            continue
        need = 4 * tp.size * matrix.per_rank * (rank + 1)
        if bucket and size + need > bucket_bytes:
            groups.append(MatrixGroup(bucket, rank, True, tp))
            bucket, size = {}, 0
        bucket[index] = matrix
        size += need
    return [*groups, MatrixGroup(bucket, rank, True, tp)] if bucket else groups


# --- records of a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientStats:
    """What a step is decided from: fp32 on the device, the same on all ranks but for ``local_squares``.

    ``squares`` [N + 1]: squared global norms of the gradients, each element counted by its owner; last, a NaN if the loss of
    some rank is not finite. ``local_squares`` [N + 1]: this rank's part of them. ``norms`` [N, 2]: see
    UpdateGroup._update_norms. ``clip`` 0-d: factor of all gradients. ``alive`` [1]: the number of ranks on which no earlier
    part of the step forbids to write. ``checks``: the canaries of all collectives that lead here, summed over ranks.
    """

    local_squares: Tensor
    squares: Tensor
    norms: Tensor
    clip: Tensor
    alive: Tensor
    checks: Tensor


@dataclass(frozen=True)
class DecisionInputs:
    """What a decision depends on besides ``GradientStats``: [N] on the device, fp64 unless noted, the same on all ranks.

    ``projected`` (int32): 2 for APOLLO's matrices, 1 for those that the limiter leaves alone, 0 for AdamW's parameters.
    ``root_scales``: square roots of their scale. ``indices`` (int64): where each parameter stands in ``limiter_norms`` and
    ``weight_norms``, which hold all parameters of the model; a decision changes ``limiter_norms``. ``expected_checks``
    (fp32): what ``GradientStats.checks`` are if every collective happened on all ranks; the first is P. ``corrections``:
    Adam's bias correction of this step. ``steps`` (int32): updates before it. ``learning_rate``: 0-d.
    """

    projected: Tensor
    root_scales: Tensor
    indices: Tensor
    limiter_norms: Tensor
    weight_norms: Tensor
    expected_checks: Tensor
    corrections: Tensor
    steps: Tensor
    learning_rate: Tensor


@dataclass
class Decision:
    """What all ranks know before anything is written, on the device.

    ``write`` (int32 [N]): 1 for each parameter to write, 0 for all in a skipped step. ``coefficients`` (fp32 [N]) multiply
    channel scale and gradient of matrices, ``clip`` (fp32, 0-d) the gradients of AdamW's parameters. ``good`` (int32, 0-d):
    1 if all is finite, no step too long, and every collective happened. ``report`` (fp64 [3 + 2 N]): see ``read_report``.
    ``local_squares`` (fp32 [N + 1]): those of ``GradientStats``.
    """

    clip: Tensor
    write: Tensor
    coefficients: Tensor
    good: Tensor
    report: Tensor
    local_squares: Tensor
    _sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def send_report(self) -> None:
        """Start to copy ``report`` to the host. Called before the write, so that nobody waits for that."""
        if self.report.device.type != "cuda":
            self._sent = self.report, None
            return
        host = torch.empty(self.report.shape, dtype=self.report.dtype, pin_memory=True)
        host.copy_(self.report, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent = host, event

    def read_report(self) -> list[float]:
        """3 + 2 N numbers: whether every collective happened, whether all is finite, the squared gradient norm, N write
        flags, N relative updates. Waits for them."""
        assert self._sent is not None  # UpdateGroup.update sent it
        report, event = self._sent
        if event is not None:
            event.synchronize()
        return report.tolist()  # type: ignore[no-any-return]

    def written(self) -> list[bool]:
        """Which of the N parameters were written. Waits for the report."""
        return [bool(flag) for flag in self.read_report()[3 : 3 + len(self.write)]]


@dataclass(frozen=True)
class ChannelScales:
    """fp32 factors of the channels of all matrices of an update group; APOLLO-Mini's are all 1.

    ``local`` [rows of all groups]: of this rank's rows of moments. ``gathered`` [P, rows of all exchanged groups + 1]:
    those of all ranks and, last, the canary of each rank's part; None if no matrix is exchanged. ``starts``: the column of
    ``gathered`` where the rows of an exchanged parameter begin, by its index.
    """

    local: Tensor
    gathered: Tensor | None
    starts: dict[int, int]

    def of(self, group: MatrixGroup, member: Member) -> Tensor:
        """fp32 [channels_local] of one matrix."""
        if not group.exchanged:
            return self.local[group.first_row :][member.rows]
        assert self.gathered is not None  # UpdateGroup._gather_scales
        start, matrix = self.starts[member.index], member.matrix
        return self.gathered[:, start : start + matrix.per_rank].reshape(-1)[: matrix.num_channels]
