"""The local arithmetic of a step on CUDA: tables of what lies where, and the launches of ``kernels``.

The same methods as ``torch_backend.TorchBackend``, which is the oracle. Nothing here waits for the device. Tables are made
once; only the addresses of the gradients are sent in a step, if they changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_tp.config import OptimConfig, Precision, Projection
from apollo_tp.optim import kernels
from apollo_tp.optim.adamw import AdamWState
from apollo_tp.optim.decide_kernel import DecideOnDevice
from apollo_tp.optim.interface import Decision, Scales
from apollo_tp.optim.projection import num_words
from apollo_tp.optim.sharding import MatrixGroup
from apollo_tp.optim.tiles import Piece, Row, aligned, make_launches, pieces
from apollo_tp.optim.weight import Weight, to_device

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
PROJECT_TILE = (128, 64)
"""Channels by contracted elements that a program of the projection holds at a time."""
PROJECT_WARPS, PROJECT_STAGES = 4, 4
"""Two programs of four warps fit an SM of compute capability 9.0: 80 KiB of shared memory and 242 registers each."""
WRITE_TILE = {False: (4, 1024), True: (2, 2048)}
"""Rows by columns that a program of an elementwise kernel writes, without and with an int8 remainder."""
WRITE_WARPS = 4


class TritonBackend:
    """Works on the groups and AdamW states that the optimizer owns; ``gradients`` are LOCAL, (rows, columns), by index."""

    def __init__(
        self, groups: Sequence[MatrixGroup], adamw: Sequence[AdamWState], config: OptimConfig, weights: Sequence[Weight]
    ) -> None:
        self.groups, self.adamw, self.config, self.weights = groups, adamw, config, weights
        self.device = weights[0].data.device
        self.rank = groups[0].rank if groups else 1
        self.rank_padded = max(16, triton.next_power_of_2(self.rank))
        self.layout: list[tuple[Any, ...]] = []
        self.starts: list[int] = []
        self.word_parts: list[Tensor | None] = []
        self.adamw_index = torch.tensor([a.index for a in adamw], dtype=torch.int64, device=self.device)
        self.decide = DecideOnDevice(config, self.device)
        self.row_parameters = [
            g.index.repeat_interleave(g.segments, output_size=g.num_rows).to(torch.int32) for g in groups
        ]
        sizes = [math.prod(g.buffer_shape) for g in groups]
        self.buffer_starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    # --- tables ----------------------------------------------------------------------------------------------------

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        """Bring tables and addresses in line with these gradients, which the next calls work on."""
        starts = [g.data_ptr() for g in gradients]
        if starts == self.starts:
            return
        layout = [(g.stride(), start % 16) for g, start in zip(gradients, starts, strict=True)]
        if layout != self.layout:
            self._build(gradients)
        self.layout, self.starts = layout, starts
        for launch in (*self.project_launches, *self.write_launches, *self.adamw_launches):
            rows = [starts[i] + offset for i, offset in zip(launch.owners, launch.offsets, strict=True)]
            launch.addresses = self._tensor(rows, torch.int64)

    def _build(self, gradients: Sequence[Tensor]) -> None:
        self.project_launches = make_launches(self._project_rows(gradients), self.device, 1)
        self.write_launches = make_launches(self._write_rows(gradients), self.device, 2)
        self.adamw_launches = make_launches(self._adamw_rows(gradients), self.device, 2)

    def _project_rows(self, gradients: Sequence[Tensor]) -> Iterator[Row]:
        """One row per matrix that this rank projects."""
        column = 0
        for group, start in zip(self.groups, self.buffer_starts, strict=False):
            block_stride = group.buffer_shape[1] if group.exchanged else 0
            for position, matrix in enumerate(group.matrices):
                gradient, projection_start = gradients[matrix.index], column
                column += matrix.columns.numel()
                if group.exchanged and not matrix.weight.represents:
                    continue
                by_channel = matrix.channels_first(gradient)
                channels, contracted = by_channel.shape
                first = group.rows(position).start
                even = channels % 16 == 0 and contracted % 16 == 0 and aligned(gradient)
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
                # signs are exact in bf16, Gaussian entries are not; Triton's interpreter (CPU) cannot multiply bf16
                narrow = gradient.dtype is torch.bfloat16 and self.device.type == "cuda"
                options = {
                    "CHANNELS_LAST": matrix.channel_dim == 1,
                    "EVEN": even,
                    "WIDE": not narrow or self.config.projection is Projection.gaussian,
                    "G_TYPE": _TYPES[gradient.dtype],
                }
                yield Row(options, entry, (channels,), PROJECT_TILE[:1], matrix.index, 0)

    def _write_rows(self, gradients: Sequence[Tensor]) -> Iterator[Row]:
        """One row per piece of a projected matrix."""
        local_start = exchanged_start = 0
        exchanged_rows = sum(g.num_rows for g in self.groups if g.exchanged)
        local_rows = sum(g.num_rows for g in self.groups if not g.exchanged)
        for group in self.groups:
            for position, matrix in enumerate(group.matrices):
                first = group.rows(position).start
                if group.exchanged:
                    scale = [local_rows + exchanged_start + first, matrix.per_rank, exchanged_rows + 1]  # and a canary
                else:
                    scale = [local_start + first, max(1, matrix.num_rows), 0]
                for piece in pieces(matrix.weight):
                    channel0 = piece.row if matrix.channel_dim == 0 else piece.column
                    yield self._row(piece, gradients, [*scale, channel0], {"CHANNELS_LAST": matrix.channel_dim == 1})
            if group.exchanged:
                exchanged_start += group.num_rows
            else:
                local_start += group.num_rows

    def _adamw_rows(self, gradients: Sequence[Tensor]) -> Iterator[Row]:
        """One row per piece of an AdamW parameter."""
        for state in self.adamw:
            columns = state.weight.local_2d[1]
            for piece in pieces(state.weight):
                skip = 4 * (piece.row * columns + piece.column)
                moments = [state.exp_avg.data_ptr() + skip, state.exp_avg_sq.data_ptr() + skip, columns, 0]
                yield self._row(piece, gradients, moments, {})

    def _row(self, piece: Piece, gradients: Sequence[Tensor], own: list[int], options: dict[str, Any]) -> Row:
        weight, index = piece.weight, piece.weight.index
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
            0 if rest is None else rest.data_ptr() + rest_skip,
            weight.local_2d[1],
            *own,
            piece.global_row,
            piece.global_column,
            key - (1 << 64) if key >> 63 else key,
        ]
        # 16 elements: the remainder is one byte each
        widths = (piece.column, piece.columns, piece.global_column, weight.local_2d[1])
        even = aligned(data) and aligned(gradient) and all(width % 16 == 0 for width in widths)
        bf16 = data.dtype is torch.bfloat16
        options = options | {
            "EVEN": even,
            "REMAINDER": rest is not None,
            "STOCHASTIC": bf16 and weight.precision is Precision.stochastic,
            "W_TYPE": _TYPES[data.dtype],
            "G_TYPE": _TYPES[gradient.dtype],
        }
        offset = (piece.row * gradient.stride(0) + piece.column) * gradient.element_size()
        return Row(options, entry, (piece.rows, piece.columns), WRITE_TILE[rest is not None], index, offset)

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, self.device)

    # --- the step --------------------------------------------------------------------------------------------------

    def begin(self, learning_rate: float, steps: Sequence[int], steps_on_device: Tensor) -> None:
        """Numbers of this step, for what follows: each parameter's updates before it. After ``project``, so that the device
        is busy meanwhile."""
        self.steps = steps_on_device
        if self.adamw:
            beta1, beta2 = self.config.betas
            decay = 1.0 - learning_rate * self.config.weight_decay
            decays = [decay if w.is_matrix else 1.0 for w in self.weights]
            corrections = [1 - beta1 ** (n + 1) for n in steps] + [1 - beta2 ** (n + 1) for n in steps]
            small = self._tensor([*decays, *corrections], torch.float32)
            self.decays, self.corrections = small[: len(decays)], small[len(decays) :]

    def project(self, gradients: Sequence[Tensor]) -> None:
        """Fill ``all_projected`` and ``all_energy`` of every group."""
        if not self.groups:
            return
        flat = torch.empty(self.buffer_starts[-1], device=self.device)
        for group, start, stop in zip(self.groups, self.buffer_starts, self.buffer_starts[1:], strict=False):
            if group.exchanged:
                flat[start:stop].zero_()  # padding, and what other replicas contribute
            group.use(flat[start:stop].view(group.buffer_shape))
        projections = self._projections()
        for launch in self.project_launches:
            kernels.project_kernel[launch.grid](
                *launch.tiles,
                launch.table,
                launch.addresses,
                projections,
                flat,
                1.0 / math.sqrt(self.rank),
                RANK=self.rank,
                RANK_PADDED=self.rank_padded,
                BLOCK_C=PROJECT_TILE[0],
                BLOCK_K=PROJECT_TILE[1],
                num_warps=PROJECT_WARPS if self.rank_padded <= 64 else 8,
                num_stages=PROJECT_STAGES if self.rank_padded <= 128 else 3,
                **launch.options,
            )

    def _projections(self) -> Tensor:
        """(columns of all matrices, padded rank): dense for the time of a step; a few bits per column are kept."""
        matrices = [m for g in self.groups for m in g.matrices]
        if self.config.projection is Projection.gaussian:
            dense = torch.cat([m.projection(self.rank) for m in matrices])
            return torch.nn.functional.pad(dense, (0, self.rank_padded - self.rank)).contiguous()
        current = [m.words for m in matrices]
        if len(self.word_parts) != len(current) or any(
            a is not b for a, b in zip(self.word_parts, current, strict=True)
        ):
            self.word_parts, self.words = current, torch.cat([m.words for m in matrices if m.words is not None])
        columns, block = self.words.shape[0], 64
        dense = torch.empty(columns, self.rank_padded, dtype=torch.bfloat16, device=self.device)
        kernels.unpack_signs_kernel[(triton.cdiv(columns, block),)](
            self.words,
            dense,
            columns,
            RANK=self.rank,
            RANK_PADDED=self.rank_padded,
            WORDS=num_words(self.rank),
            BLOCK=block,
        )
        return dense

    def row_norms(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norms of adapted and of projected gradient, (rows of all groups,). ``clip`` is 0-d. No moment moves."""
        return self._rows(clip, scales=False)

    def row_scales(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Channel scales, and the squared norm of each scaled, clipped channel, (rows of all groups,). No moment moves."""
        return self._rows(clip, scales=True)

    def _rows(self, clip: Tensor, *, scales: bool) -> tuple[Tensor, Tensor]:
        both = torch.empty(2, sum(g.num_rows for g in self.groups), device=self.device)
        for group in self.groups:
            first, second = both[:, group.first_row : group.first_row + group.num_rows]
            tensors = (group.energy, first, second, clip)
            self._by_rows(kernels.rows_kernel, group, tensors, (self.config.eps,), {"SCALES": scales})
        return both[0], both[1]

    def _by_rows(
        self,
        kernel: Any,
        group: MatrixGroup,
        tensors: tuple[Tensor, ...],
        scalars: tuple[float, ...],
        options: dict[str, bool],
    ) -> None:
        block = max(1, 4096 // self.rank_padded)
        if group.num_rows:
            kernel[(triton.cdiv(group.num_rows, block),)](
                group.projected,
                group.exp_avg,
                group.exp_avg_sq,
                *tensors,
                group.num_rows,
                *self.config.betas,
                *scalars,
                RANK=self.rank,
                RANK_PADDED=triton.next_power_of_2(self.rank),
                BLOCK=block,
                **options,
            )

    def adamw_square_sums(self, gradients: Sequence[Tensor]) -> Tensor:
        """Squared norm of each AdamW parameter's local gradient."""
        return self._adamw(0, None)

    def adamw_update_norms(self, gradients: Sequence[Tensor], clip: Tensor) -> Tensor:
        """Squared norm of each local AdamW update at learning rate 1."""
        return self._adamw(1, clip)

    def _adamw(
        self, stage: int, clip: Tensor | None, learning_rate: float = 0.0, write: Tensor | None = None
    ) -> Tensor:
        """Run one stage of the AdamW kernel; returns the sums of stages 0 and 1 by AdamW parameter."""
        count = len(self.weights)
        sums = torch.zeros(count, device=self.device)
        for launch in self.adamw_launches:
            partial = torch.empty(launch.grid, device=self.device)
            kernels.adamw_kernel[launch.grid](
                *launch.tiles,
                launch.table,
                launch.addresses,
                partial,
                self.steps if write is None else write,
                self.steps,
                self.decays,
                self.corrections,
                self.decays if clip is None else clip,
                count,
                learning_rate,
                *self.config.betas,
                self.config.eps,
                STAGE=stage,
                BLOCK_R=WRITE_TILE[launch.options["REMAINDER"]][0],
                BLOCK_N=WRITE_TILE[launch.options["REMAINDER"]][1],
                num_warps=WRITE_WARPS,
                **launch.options,
            )
            if stage < 2:
                # a parameter may have pieces in several launches; once in each, so that no order of additions is left open
                sums[launch.distinct] += torch.segment_reduce(partial, "sum", lengths=launch.tile_counts, unsafe=True)
        return sums[self.adamw_index]

    def write(self, gradients: Sequence[Tensor], decision: Decision, scales: Scales) -> None:
        """Move moments and write weights where ``decision.write`` says so."""
        for group, parameters in zip(self.groups, self.row_parameters, strict=True):
            self._by_rows(kernels.commit_kernel, group, (parameters, decision.write, decision.clip), (), {})
        if self.groups:
            self._write_matrices(decision, scales)
        if self.adamw:
            self._adamw(2, decision.clip, decision.learning_rate, decision.write)

    def _write_matrices(self, decision: Decision, scales: Scales) -> None:
        all_scales = scales.local
        if scales.gathered is not None:
            local_rows = sum(g.num_rows for g in self.groups if not g.exchanged)
            all_scales = torch.cat([all_scales[:local_rows], scales.gathered.flatten()])
        for launch in self.write_launches:
            kernels.write_kernel[launch.grid](
                *launch.tiles,
                launch.table,
                launch.addresses,
                all_scales,
                decision.coefficients,
                decision.write,
                self.steps,
                1.0 - decision.learning_rate * self.config.weight_decay,
                BLOCK_R=WRITE_TILE[launch.options["REMAINDER"]][0],
                BLOCK_N=WRITE_TILE[launch.options["REMAINDER"]][1],
                num_warps=WRITE_WARPS,
                **launch.options,
            )
