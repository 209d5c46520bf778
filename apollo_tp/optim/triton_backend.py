"""The local arithmetic of a step on CUDA: launches of ``kernels`` over the tables of ``tiles``.

The same methods as ``torch_backend.TorchBackend``, which is the oracle. Nothing here waits for the device. Tables are made
once; only the addresses of the gradients are sent in a step, if they changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from apollo_tp.config import OptimConfig, OptimizerKind, Projection
from apollo_tp.optim import kernels
from apollo_tp.optim.decide_kernel import DecideOnDevice
from apollo_tp.optim.parameters import AdamWState, Weight, to_device
from apollo_tp.optim.projection import num_words
from apollo_tp.optim.sharding import ChannelScales, Decision, DecisionInputs, GradientStats, MatrixGroup
from apollo_tp.optim.tiles import adamw_rows, make_launches, project_rows, write_rows

PROJECT_TILE = (128, 64)
"""Channels by contracted elements that a program of the projection holds at a time."""
PROJECT_WARPS, PROJECT_STAGES = 4, 4
"""Two programs of four warps fit an SM of compute capability 9.0: 80 KiB of shared memory and 242 registers each."""
WRITE_TILE = {False: (4, 1024), True: (2, 2048)}
"""Rows by columns that a program of an elementwise kernel writes, without and with a remainder."""
WRITE_WARPS = 4


class TritonBackend:
    """As ``TorchBackend``. ``weights`` are all parameters of the update group."""

    def __init__(
        self,
        groups: Sequence[MatrixGroup],
        adamw: Mapping[int, AdamWState],
        config: OptimConfig,
        weights: Sequence[Weight],
    ) -> None:
        self.groups, self.adamw, self.config, self.weights = groups, adamw, config, weights
        self.device = weights[0].data.device
        self.rank = groups[0].rank if groups else 1
        self.rank_padded = max(16, triton.next_power_of_2(self.rank))
        self.layout: list[tuple[Any, ...]] = []
        self.starts: list[int] = []
        self.word_parts: list[Tensor | None] = []
        self.adamw_index = torch.tensor(list(adamw), dtype=torch.int64, device=self.device)
        self._decide = DecideOnDevice(config, self.device)
        self.row_parameters = [
            g.index.repeat_interleave(g.lengths, output_size=g.num_rows).to(torch.int32) for g in groups
        ]
        sizes = [math.prod(g.buffer_shape) for g in groups]
        self.buffer_starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    # --- tables ----------------------------------------------------------------------------------------------------

    def _prepare(self, gradients: Sequence[Tensor]) -> None:
        """Bring tables and addresses in line with these gradients, which the next launches work on."""
        starts = [g.data_ptr() for g in gradients]
        if starts == self.starts:
            return
        layout = [(g.stride(), start % 16) for g, start in zip(gradients, starts, strict=True)]
        if layout != self.layout:
            self._build(gradients)
        self.layout, self.starts = layout, starts
        for launch in (*self.project_launches, *self.write_launches, *self.adamw_launches):
            rows = [starts[i] + offset for i, offset in zip(launch.owners, launch.offsets, strict=True)]
            launch.addresses = to_device(rows, torch.int64, self.device)

    def _build(self, gradients: Sequence[Tensor]) -> None:
        # signs are exact in bf16, Gaussian entries are not; Triton's interpreter (CPU) cannot multiply bf16
        exact = self.device.type == "cuda" and self.config.projection is not Projection.gaussian
        projected = project_rows(self.groups, self.buffer_starts, gradients, PROJECT_TILE[0], exact)
        self.project_launches = make_launches(projected, self.device, 1)
        self.write_launches = make_launches(write_rows(self.groups, gradients, WRITE_TILE), self.device, 2)
        self.adamw_launches = make_launches(adamw_rows(self.adamw, gradients, WRITE_TILE), self.device, 2)

    # --- the step --------------------------------------------------------------------------------------------------

    def project(self, gradients: Sequence[Tensor]) -> None:
        """Fill ``all_projected`` and ``all_energy`` of every group, which are views of one allocation."""
        if not self.groups:
            return
        self._prepare(gradients)
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
        """[contracted_local of all matrices, padded r], bf16 signs or fp32 Gaussian numbers: dense for the time of a step;
        a few bits per column are kept."""
        matrices = [member.matrix for g in self.groups for member in g.members]
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

    def begin(
        self, gradients: Sequence[Tensor], learning_rate: float, steps: Sequence[int], steps_on_device: Tensor
    ) -> None:
        """Tables of these gradients and numbers of this step, for all that follows."""
        self._prepare(gradients)
        self.learning_rate, self.steps = learning_rate, steps_on_device
        if self.adamw:
            beta1, beta2 = self.config.betas
            decay = 1.0 - learning_rate * self.config.weight_decay
            decays = [decay if w.is_matrix else 1.0 for w in self.weights]
            corrections = [1 - beta1 ** (n + 1) for n in steps] + [1 - beta2 ** (n + 1) for n in steps]
            small = to_device([*decays, *corrections], torch.float32, self.device)
            self.decays, self.corrections = small[: len(decays)], small[len(decays) :]

    def row_stats(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Two vectors, fp32 [rows of all groups]; see ``TorchBackend.row_stats``."""
        both = torch.empty(2, sum(g.num_rows for g in self.groups), device=self.device)
        scales = self.config.kind is not OptimizerKind.apollo_mini
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
        """Launch a kernel over the rows of moments of ``group``."""
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
        """fp32 [AdamW parameters]: squared norm of each one's local gradient (that of ``begin``)."""
        return self._adamw(0, None)

    def adamw_update_norms(self, gradients: Sequence[Tensor], clip: Tensor) -> Tensor:
        """fp32 [AdamW parameters]: squared norm of each local update at learning rate 1."""
        return self._adamw(1, clip)

    def _adamw(self, stage: int, clip: Tensor | None, write: Tensor | None = None) -> Tensor:
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
                self.learning_rate,
                *self.config.betas,
                self.config.eps,
                STAGE=stage,
                **_write_options(launch.options),
            )
            if stage < 2:
                # a parameter may have pieces in several launches; once in each, so that no order of additions is left open
                sums[launch.distinct] += torch.segment_reduce(partial, "sum", lengths=launch.tile_counts, unsafe=True)
        return sums[self.adamw_index]

    def decide(self, stats: GradientStats, inputs: DecisionInputs) -> Decision:
        """See ``torch_backend.decide``, in the chosen form."""
        return self._decide(stats, inputs)

    def write(self, gradients: Sequence[Tensor], decision: Decision, scales: ChannelScales) -> None:
        """Move moments and write weights where ``decision.write`` says so; ``gradients`` are those of ``begin``."""
        for group, parameters in zip(self.groups, self.row_parameters, strict=True):
            self._by_rows(kernels.commit_kernel, group, (parameters, decision.write, decision.clip), (), {})
        if self.groups:
            self._write_matrices(decision, scales)
        if self.adamw:
            self._adamw(2, decision.clip, decision.write)

    def _write_matrices(self, decision: Decision, scales: ChannelScales) -> None:
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
                1.0 - self.learning_rate * self.config.weight_decay,
                **_write_options(launch.options),
            )


def _write_options(options: dict[str, Any]) -> dict[str, Any]:
    """The constants of a launch of an elementwise kernel, with those that follow from them."""
    block_rows, block_columns = WRITE_TILE[options["REMAINDER"] > 0]
    return options | {"BLOCK_R": block_rows, "BLOCK_N": block_columns, "num_warps": WRITE_WARPS}
