"""APOLLO and AdamW over tensor-parallel shards: one step on every rank, agreed before anything is written.

A step reads the local gradients, and in this order
    1. projects every matrix (one read of its gradient), which also gives the squared norm of each channel;
    2. adds what crosses ranks: one reduce-scatter per bucket of matrices cut along their contracted dimension, and the
       scalars of all parameters in one all-reduce (clipping needs the global norm first: one more, of one float per
       parameter);
    3. decides from the added scalars alone, so every rank decides the same: skip, refuse, or go on;
    4. only now moves moments and writes weights.
Until 4 the state of the optimizer and the weights are untouched, so a skipped step leaves no trace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apollo_tp.config import EmbeddingMode, OptimConfig, OptimizerKind, Precision
from apollo_tp.errors import ConfigError
from apollo_tp.optim import checkpoint
from apollo_tp.optim.adamw import AdamWState
from apollo_tp.optim.interface import Decision, OptimParameter, Scales, StepOutcome
from apollo_tp.optim.matrices import Matrix, make_groups, moment_rank, refresh_projections
from apollo_tp.optim.replicas import check_replicas
from apollo_tp.optim.schedule import learning_rate
from apollo_tp.optim.torch_backend import TorchBackend
from apollo_tp.optim.weight import Weight
from apollo_tp.parallel import TPGroup

if TYPE_CHECKING:
    from apollo_tp.optim.triton_backend import TritonBackend

BUCKET_BYTES = 64 * 2**20
"""Upper bound of one reduce-scatter's buffer; a single larger matrix gets a bucket of its own."""


def build_optimizer(
    config: OptimConfig, precision: Precision, parameters: Sequence[OptimParameter], tp: TPGroup
) -> Optimizer:
    """The optimizer of this rank. All ranks pass the same names in the same order. One all-reduce.

    Raises ConfigError if there is nothing to train or a name occurs twice, UnsupportedModelError for a dtype or shape
    that cannot be written in place.
    """
    return Optimizer(config, precision, parameters, tp)


class Optimizer:
    """State of all trained parameters on this rank, complete from construction on (same keys on every rank)."""

    def __init__(
        self, config: OptimConfig, precision: Precision, parameters: Sequence[OptimParameter], tp: TPGroup
    ) -> None:
        self.config, self.precision, self.tp = config, precision, tp
        frozen = config.embeddings is EmbeddingMode.frozen
        trained = [p for p in parameters if not (frozen and p.role == "embedding")]
        self.names = [p.name for p in trained]
        if not trained or len(set(self.names)) < len(trained):
            raise ConfigError(
                f"parameters: got {len(trained)} to train with {len(set(self.names))} names, expected at least one and "
                "distinct names; a tied embedding and head are one parameter"
            )
        self.weights = [Weight(i, p, precision, config.seed, tp.rank) for i, p in enumerate(trained)]
        self.device = self.weights[0].data.device
        self.matrices = [Matrix(i, self.weights[i], config, tp) for i, p in enumerate(trained) if _projects(p, config)]
        projected = {m.index for m in self.matrices}
        self.adamw = [AdamWState(i, w) for i, w in enumerate(self.weights) if i not in projected]
        self.rank = moment_rank(config)
        self.groups = make_groups(self.matrices, self.rank, tp, BUCKET_BYTES)
        self.backend = _make_backend(self)
        self.step_count = self.skipped_in_a_row = 0
        self.steps = [0] * len(trained)  # updates of each parameter; a step with zero gradient is none
        self.limiter_norms = self._vector([0.0] * len(trained))
        self.is_matrix = self._vector([float(i in projected) for i in range(len(trained))])
        self.adamw_index = torch.tensor([a.index for a in self.adamw], dtype=torch.int64, device=self.device)
        self.adamw_counts = self._vector([float(a.weight.represents) for a in self.adamw]).float()
        exchanged = [m for g in self.groups if g.exchanged for m in g.matrices]
        starts = itertools.accumulate((m.per_rank for m in exchanged), initial=0)
        self.gather_starts = {m.index: start for m, start in zip(exchanged, starts, strict=False)}
        roots = {m.index: m.root_scale for m in self.matrices}
        self.root_scales = self._vector([roots.get(i, 1.0) for i in range(len(trained))])
        self._measure_weights()

    # --- the step --------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Drop the gradients of all trained parameters."""
        for weight in self.weights:
            weight.parameter.tensor.grad = None

    def step(self, learning_rate_scale: float = 1.0, loss: Tensor | None = None) -> StepOutcome:
        """Update all weights in place from their local gradients, or none on any rank.

        ``loss`` (0-d) is only tested: if it is not finite on some rank, no rank writes. Collectives: one all-reduce of 3
        floats per parameter (with clipping, one of 1 and one of 2); if a matrix is cut along its contracted dimension, a
        reduce-scatter per bucket and one all-gather of channel scales; now and then one all-reduce of weight norms
        (every ``refresh_every`` steps) and one all-gather of checksums (every ``check_replicas_every``).
        Raises ReplicaError if replicas of a weight differ.
        """
        lr = learning_rate(self.config, self.step_count) * learning_rate_scale
        gradients = [weight.gradient() for weight in self.weights]
        decision = self._decide(gradients, lr, loss)
        self.backend.write(gradients, decision, self._gather_scales(), self.steps)
        for group in self.groups:
            group.release()
        finite, grad_norm, written, relative = decision.fetch()
        skipped = self._why_skipped(finite, relative, decision)
        if skipped:
            self.skipped_in_a_row += 1
            return StepOutcome(skipped, grad_norm, lr, 0, 0.0, self.skipped_in_a_row)
        self.limiter_norms = decision.limiter_norms
        self.steps = [n + moved for n, moved in zip(self.steps, written, strict=True)]
        self.step_count, self.skipped_in_a_row = self.step_count + 1, 0
        if self.step_count % self.config.refresh_every == 0:
            self._measure_weights()
        if self.config.check_replicas_every and self.step_count % self.config.check_replicas_every == 0:
            check_replicas(self.weights, self.tp)
        return StepOutcome("", grad_norm, lr, sum(written), max(relative), 0)

    def _decide(self, gradients: list[Tensor], lr: float, loss: Tensor | None) -> Decision:
        """Projections, exchanges, scalars and the decision. Touches neither state nor weights."""
        config = self.config
        bias = self._vector([_bias_correction(n + 1, config.betas) for n in self.steps])
        first = self._vector([float(n == 0) for n in self.steps])
        refresh_projections(self.matrices, [self.steps[m.index] // config.refresh_every for m in self.matrices], config)
        self.backend.project(gradients)
        sums = self._local_square_sums(gradients, loss)
        local_sums = sums.clone()
        for group in self.groups:
            group.exchange()
        clip = sums.new_ones(())
        if config.max_grad_norm is not None:
            self.tp.all_reduce_(sums)
            clip = (config.max_grad_norm / (sums[:-1].sum().sqrt() + 1e-6)).clamp(max=1.0)
        norms = self._update_norms(gradients, clip)
        if config.max_grad_norm is not None:
            self.tp.all_reduce_(norms)
        else:
            packed = self.tp.all_reduce_(torch.cat([norms.flatten(), sums]))
            norms, sums = packed[: norms.numel()].view_as(norms), packed[norms.numel() :]
        return self._agree(lr, clip, sums, norms, bias, first, local_sums)

    def _agree(
        self, lr: float, clip: Tensor, sums: Tensor, norms: Tensor, bias: Tensor, first: Tensor, local_sums: Tensor
    ) -> Decision:
        """The decision, from scalars that are the same on all ranks; (parameters,) vectors in fp64."""
        config, square_sums = self.config, sums[:-1].double()
        norm, inner = norms[:, 0].double().sqrt(), torch.ones_like(bias)
        if config.kind is OptimizerKind.apollo_mini:
            mini = norm / (norms[:, 1].double().sqrt() + 1e-8)
            inner = torch.where(self.is_matrix > 0, mini, inner)
            norm = torch.where(self.is_matrix > 0, mini * clip * square_sums.sqrt(), norm)
        excess = torch.ones_like(bias)
        if config.norm_growth_limit is not None:
            gamma = config.norm_growth_limit
            excess = (norm / (self.limiter_norms + 1e-8)).clamp(min=gamma) / gamma
            excess = torch.where((first > 0) | (self.is_matrix == 0), torch.ones_like(bias), excess)
        factor = torch.where(self.is_matrix > 0, lr * bias * self.root_scales, torch.full_like(bias, lr)) / excess
        active = square_sums > 0
        relative = torch.where(active, factor * norm / self.weight_norms, torch.zeros_like(bias))
        finite = torch.isfinite(sums).all() & torch.isfinite(norms).all()
        write = active & finite & (relative <= config.max_relative_update).all()
        limiter_norms = torch.where(write, norm / excess, self.limiter_norms)
        grad_norm = square_sums.sum().sqrt()
        coefficients = factor * inner * clip
        return Decision(lr, clip, write, coefficients, limiter_norms, relative, grad_norm, finite, local_sums)

    def _gather_scales(self) -> Scales:
        """The channel scales of other ranks; one all-gather for all exchanged matrices."""
        exchanged = [g for g in self.groups if g.exchanged]
        if not exchanged or self.config.kind is OptimizerKind.apollo_mini:
            return Scales(None, {})
        gathered = self.tp.all_gather(torch.cat([g.scales for g in exchanged])).view(self.tp.size, -1)
        return Scales(gathered, self.gather_starts)

    # --- what a step knows -----------------------------------------------------------------------------------------

    def _local_square_sums(self, gradients: list[Tensor], loss: Tensor | None) -> Tensor:
        """(parameters + 1,) fp32: squared gradient norms of this rank's part, replicas once; last, not-finite losses."""
        sums = torch.zeros(len(self.names) + 1, device=self.device)
        for group in self.groups:
            sums[group.index] = group.segment_sum(group.all_energy.sum(0))
        if self.adamw:
            sums[self.adamw_index] = self.backend.adamw_square_sums(gradients) * self.adamw_counts
        if loss is not None:
            sums[-1] = torch.where(torch.isfinite(loss.detach()), 0.0, torch.nan).to(self.device)
        return sums

    def _update_norms(self, gradients: list[Tensor], clip: Tensor) -> Tensor:
        """(parameters, 2) fp32, this rank's part: what the limiter and the limit on the size of a step need.

        Channel scaling: squared norm of the scaled, clipped gradient; also sets each group's ``scales``. APOLLO-Mini: the
        squared norms of adapted and projected gradient. AdamW: squared norm of the update at learning rate 1.
        """
        norms = torch.zeros(len(self.names), 2, device=self.device)
        for group in self.groups:
            adapted_sq, projected_sq = self.backend.row_norms(group, clip)
            if self.config.kind is OptimizerKind.apollo_mini:
                group.scales = torch.ones_like(group.energy)
                sums = [group.segment_sum(adapted_sq), group.segment_sum(projected_sq)]
            else:
                group.scales = adapted_sq.sqrt() / (projected_sq.sqrt() + 1e-8)
                limited = group.segment_sum(group.scales.square() * group.energy * clip.square())
                sums = [limited, torch.zeros_like(limited)]
            norms[group.index] = torch.stack(sums, dim=1)
        if self.adamw:
            updates = self.backend.adamw_update_norms(gradients, clip, self.steps)
            norms[self.adamw_index, 0] = updates * self.adamw_counts
        return norms

    def _why_skipped(self, finite: bool, relative: list[float], decision: Decision) -> str:
        """The reason, or "". One all-gather of flags in a step that is not finite."""
        if not finite:
            flags = self.tp.all_gather((~torch.isfinite(decision.local_sums)).to(torch.int32)).view(self.tp.size, -1)
            what = [*(f"gradient of {name}" for name in self.names), "loss"]
            found = [f"{what[i]} on rank {rank}" for rank, i in flags.nonzero().tolist()]
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            return f"not finite: {', '.join(found[:3]) or 'the sum over ranks'}{more}; nothing was written"
        largest = max(range(len(relative)), key=relative.__getitem__)
        limit = self.config.max_relative_update
        if relative[largest] <= limit:
            return ""
        return (
            f"{self.names[largest]}: learning rate {decision.learning_rate:g} would move it by {relative[largest]:.3g} of "
            f"its norm in one step, more than optim.max_relative_update={limit:g}; nothing was written; lower optim.lr"
        )

    def _measure_weights(self) -> None:
        """Norms of all matrices, global, replicas once; infinite where no limit applies. One all-reduce."""
        squares = torch.stack(
            [
                torch.linalg.vector_norm(w.data, dtype=torch.float32).square() * float(w.represents)
                if w.is_matrix
                else torch.zeros((), device=self.device)
                for w in self.weights
            ]
        )
        norms = self.tp.all_reduce_(squares).double().sqrt()
        self.weight_norms = torch.where(norms > 0, norms, torch.inf)

    def _vector(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.device, non_blocking=True)

    # --- state -----------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank: moments and int8 remainders."""
        tensors = [t for g in self.groups for t in (g.exp_avg, g.exp_avg_sq)]
        tensors += [t for a in self.adamw for t in (a.exp_avg, a.exp_avg_sq)]
        tensors += [w.remainder for w in self.weights if w.remainder is not None]
        return sum(t.nbytes for t in tensors)

    def describe(self) -> str:
        """One line for status pages and logs."""
        exchanged = sum(m.exchanged for m in self.matrices)
        rank = f", rank {self.rank}" if self.matrices else ""
        return (
            f"{self.config.kind.value}{rank}, scale {self.config.scale}, {self.precision.value}: {len(self.matrices)} "
            f"matrices projected ({exchanged} exchanged between {self.tp.size} ranks), {len(self.adamw)} tensors by AdamW, "
            f"{self.state_bytes() / 1e9:.3g} GB of state on rank {self.tp.rank}"
        )

    def save(self, folder: Path) -> None:
        """Write the state below ``folder`` in global coordinates; every rank writes its own part. See ``checkpoint``."""
        checkpoint.save(self, folder)

    def load(self, folder: Path) -> None:
        """Read a saved state, written at any number of ranks. See ``checkpoint``."""
        checkpoint.load(self, folder)


def _make_backend(optimizer: Optimizer) -> TorchBackend | TritonBackend:
    """Triton on CUDA, plain torch elsewhere. Triton is imported only here: a CPU install need not have it."""
    groups, adamw, config = optimizer.groups, optimizer.adamw, optimizer.config
    if optimizer.device.type != "cuda":
        return TorchBackend(groups, adamw, config)
    from apollo_tp.optim.triton_backend import TritonBackend

    return TritonBackend(groups, adamw, config, optimizer.weights)


def _projects(parameter: OptimParameter, config: OptimConfig) -> bool:
    """True if APOLLO projects this parameter; otherwise AdamW updates it."""
    shape = parameter.shard.global_shape
    role = parameter.role == "matrix" or (parameter.role == "embedding" and config.embeddings is EmbeddingMode.project)
    fits = len(shape) == 2 and min(shape) > moment_rank(config)
    return role and fits and config.kind is not OptimizerKind.adamw


def _bias_correction(step: int, betas: tuple[float, float]) -> float:
    return math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)
