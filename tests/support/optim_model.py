"""A set of tensors with every sharding case of the optimizer, and its parts on the ranks of a group. No model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from apollo_tp.config import OptimConfig
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.shards.boxes import Shard, merge_ranges, replicated_parts
from tests.support.reference_optimizer import ReferenceOptimizer


@dataclass(frozen=True)
class Spec:
    """A checkpoint tensor: ``parts`` are cut separately along ``dim``; at most ``pieces`` ranks hold different parts.

    ``part_pieces`` says so for each part: key and value rows of a fused tensor are replicated, query rows are not.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    role: str = "matrix"
    parts: tuple[int, ...] = ()
    pieces: int = 64
    padded: int = 0
    part_pieces: tuple[int, ...] = ()

    def shard(self, rank: int, size: int) -> Shard:
        if self.dim is None:
            return Shard(self.name, self.shape, None, (), tuple(range(size)))
        ranges = [self._ranges(other, size) for other in range(size)]
        replicas = tuple(other for other in range(size) if ranges[other] == ranges[rank])
        return Shard(self.name, self.shape, self.dim, ranges[rank], replicas, tuple(replicated_parts(ranges, rank)))

    def _ranges(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        ranges, start = [], 0
        parts = self.parts or (self.shape[self.dim],)
        for part, pieces in zip(parts, self.part_pieces or (self.pieces,) * len(parts), strict=True):
            distinct = min(size, pieces)
            piece, per = rank // (size // distinct), math.ceil((self.padded or part) / distinct)
            ranges.append((start + min(piece * per, part), start + min((piece + 1) * per, part)))
            start += part
        return merge_ranges(ranges)


SPECS = (
    Spec("case_a.weight", (96, 64), 0),
    Spec("case_b.weight", (64, 96), 1),
    Spec("case_c.weight", (64, 96), 0),
    Spec("case_c_odd.weight", (32, 97), 0),
    Spec("case_d.weight", (96, 64), 1),
    Spec("square_row.weight", (64, 64), 1),
    Spec("square_column.weight", (64, 64), 0),
    Spec("k_proj.weight", (24, 64), 0, pieces=2),
    Spec("k_tall.weight", (48, 20), 0, pieces=2),
    Spec("in_proj_qkv.weight", (96, 64), 0, parts=(24, 24, 48)),
    Spec("in_proj_wide.weight", (32, 80), 0, parts=(8, 8, 16)),
    Spec("qkv_tall.weight", (96, 64), 0, parts=(64, 16, 16), part_pieces=(64, 1, 1)),
    Spec("qkv_wide.weight", (32, 80), 0, parts=(16, 8, 8), part_pieces=(64, 2, 2)),
    Spec("qkv.bias", (96,), 0, "other", parts=(64, 16, 16), part_pieces=(64, 1, 1)),
    Spec("router.weight", (16, 64), None),
    Spec("embed_tokens.weight", (70, 24), 0, "embedding", padded=128),
    Spec("small.weight", (8, 64), 0),
    Spec("norm.weight", (64,), None, "other"),
    Spec("a_log", (12,), 0, "other"),
    Spec("conv1d.weight", (96, 1, 4), 0, "other", parts=(24, 24, 48)),
)


def weights() -> dict[str, torch.Tensor]:
    """Full fp32 tensors, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return {s.name: torch.randn(s.shape, generator=generator) * 0.02 for s in SPECS}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Full fp32 gradients of ``step``: a lasting direction plus noise, of a different size for each row."""
    steady, noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(100 + step)
    result = {}
    for spec in SPECS:
        lasting = torch.randn(spec.shape, generator=steady) * torch.rand(spec.shape[0], generator=steady).view(
            -1, *[1] * (len(spec.shape) - 1)
        )
        result[spec.name] = 1e-2 * (0.3 * lasting + torch.randn(spec.shape, generator=noise)) * 0.97**step
    return result


def part(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The rank's part of ``whole``, a copy."""
    if shard.dim is None:
        return whole.clone()
    pieces = [whole.narrow(shard.dim, start, stop - start) for start, stop in shard.ranges]
    return torch.cat(pieces, shard.dim)


def parameters(tp: TPGroup, dtype: torch.dtype = torch.float32) -> list[OptimParameter]:
    """The rank's parameters, cut from ``weights()``."""
    whole, result = weights(), []
    for spec in SPECS:
        shard = spec.shard(tp.rank, tp.size)
        tensor = torch.nn.Parameter(part(whole[spec.name], shard).to(dtype))
        result.append(OptimParameter(shard, tensor, spec.role))  # type: ignore[arg-type]
    return result


def set_gradients(params: list[OptimParameter], whole: dict[str, torch.Tensor]) -> None:
    """Give each parameter its part of the full gradients, in its own dtype."""
    for p in params:
        p.tensor.grad = part(whole[p.name], p.shard).to(p.tensor.dtype)


def local_values(params: list[OptimParameter]) -> dict[str, np.ndarray]:
    """Local weights as fp32 numpy arrays, to be sent to the parent process."""
    return {p.name: p.tensor.detach().float().numpy() for p in params}


def assemble(per_rank: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Full tensors from the ranks' parts; asserts that replicas are bit-identical and that no part is missing."""
    result = {}
    for spec in SPECS:
        whole = torch.full(spec.shape, math.nan)
        for rank, local in enumerate(per_rank):
            shard, value = spec.shard(rank, len(per_rank)), torch.from_numpy(local[spec.name])
            for box, start in shard.boxes:
                view = whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
                own = value if shard.dim is None else value.narrow(shard.dim, start, box.shape[shard.dim])
                known = ~torch.isnan(view)
                assert torch.equal(view[known], own[known]), f"{spec.name}: replicas differ on rank {rank}"
                view.copy_(own)
        assert not torch.isnan(whole).any(), f"{spec.name}: a part is on no rank"
        result[spec.name] = whole
    return result


def config(**changes: object) -> OptimConfig:
    """Small rank and short intervals, so that a few steps pass through refreshes and the limiter."""
    options: dict = {"rank": 8, "lr": 1e-3, "refresh_every": 5, "weight_decay": 0.1, "check_replicas_every": 3}
    return OptimConfig(**(options | changes))


def train_twin(config: OptimConfig, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights (global) after ``steps`` of the single-process reference, and the norm of all gradients of each step."""
    trained, norms = weights(), []
    optimizer = ReferenceOptimizer(config, trained, {s.name: s.role for s in SPECS})
    for step in range(steps):
        of_step = gradients(step)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in of_step.values())))
        assert optimizer.step(of_step) == ""
    return trained, norms


def loss_of(params: list, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss whose gradient with respect to each parameter is that parameter's part of ``whole``."""
    return sum((p.tensor.float() * part(whole[p.name], p.shard)).sum() for p in params)


def snapshot(optimizer: Optimizer) -> list[torch.Tensor]:
    """Copies of everything that a skipped step must not change."""
    group = optimizer.update_group
    tensors = [t for g in (*group.groups, *group.adamw.values()) for t in (g.exp_avg, g.exp_avg_sq)]
    tensors += [w.data for w in optimizer.weights] + [w.remainder for w in optimizer.weights if w.remainder is not None]
    counters = [group.counters.limiter_norms.clone(), torch.tensor(group.steps)]
    return [t.clone() for t in (*tensors, *counters)]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
