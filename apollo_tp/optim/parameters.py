"""Parameters as a rank trains them: what the optimizer is given, the local weight that it writes, and AdamW's moments.

Shapes: a weight of any number of dimensions is folded to two, [R, C]: all dimensions but the last become rows R. Local
unless a name or text says global. An element that several ranks hold (a replica) has one *owner*, the lowest of these ranks;
sums over ranks take each element from its owner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.optim import rounding
from apollo_tp.optim.projection import stream_key
from apollo_tp.shards.boxes import Box, Shard

_CHUNK_ELEMENTS = 1 << 24
"""Elements that the plain torch path writes at a time, to bound its fp32 temporaries to some hundred MB."""


@dataclass(frozen=True)
class OptimParameter:
    """One checkpoint tensor as this rank trains it.

    ``tensor`` is the local served view, bf16 or fp32, of ``shard.local_shape``. Its ``.grad`` must hold the complete local
    gradient when ``step`` is called: already summed over ranks where the parameter is replicated inside a parallel region,
    and over replicas of key and value heads. ``role`` is "embedding" for the embedding and the head, "matrix" for linear
    layers, "other" for the rest. Any object with these six attributes can be trained, a slice of a stacked leaf too.
    """

    shard: Shard
    tensor: torch.nn.Parameter
    role: Literal["matrix", "embedding", "other"]

    @property
    def name(self) -> str:
        """The name of the checkpoint tensor."""
        return self.shard.name

    @property
    def grad(self) -> torch.Tensor | None:
        """The local gradient, of the shape of ``tensor``; None if the backward pass left none."""
        return self.tensor.grad

    @property
    def complete_leaf(self) -> torch.nn.Parameter | None:
        """The leaf of autograd whose gradient, once accumulated, is ``grad`` and complete; None if there is none."""
        return self.tensor


@dataclass(frozen=True, eq=False)
class _Transposed:
    """``of`` with its last two dimensions in the order of memory: vLLM serves gpt-oss's experts transposed."""

    of: OptimParameter

    @property
    def shard(self) -> Shard:
        shard = self.of.shard
        *outer, rows, columns = range(len(shard.global_shape))
        order = [*outer, columns, rows]
        dim = None if shard.dim is None else order[shard.dim]
        return replace(shard, global_shape=tuple(shard.global_shape[d] for d in order), dim=dim)

    @property
    def tensor(self) -> Tensor:
        return self.of.tensor.detach().transpose(-1, -2)

    @property
    def grad(self) -> Tensor | None:
        gradient = self.of.grad
        return None if gradient is None else gradient.transpose(-1, -2)

    @property
    def role(self) -> Literal["matrix", "embedding", "other"]:
        return self.of.role

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def complete_leaf(self) -> torch.nn.Parameter | None:
        return self.of.complete_leaf


def in_memory_order(parameter: OptimParameter) -> OptimParameter:
    """``parameter``, or a view of it with its last two dimensions exchanged if its columns are what is contiguous. Elements
    of its state are addressed in that order."""
    tensor = parameter.tensor
    if tensor.ndim < 2 or has_contiguous_rows(tensor) or tensor.stride(-2) != 1:
        return parameter
    return _Transposed(parameter)  # type: ignore[return-value]


def leaf_of_complete_gradient(parameter: OptimParameter) -> torch.nn.Parameter | None:
    """The leaf in whose hook the gradient of ``parameter`` is complete; None if tensor-parallel ranks hold replicas of it,
    in whole or in part, so that its gradient may still have to be summed over them."""
    has_replicas = parameter.shard.replicated or len(parameter.shard.replica_ranks) > 1
    return None if has_replicas else parameter.complete_leaf


class Weight:
    """The local tensor of one trained parameter, and how an fp32 result is written into it.

    ``data`` [R, C] (bf16 or fp32) is a view of the served memory; ``remainder`` [R, C] (int8 or int16) is what bf16 cuts
    off, None if the precision keeps none. ``is_matrix`` is False for tensors of one dimension: they have no weight decay and
    no limit on the size of a step.

    ``is_owner``: this rank owns the content, but for the ranges that a lower rank holds too. ``owned_ranges``: the global
    ranges (start, stop, owned) of the shard along its cut dimension, in local order, cut where ``owned`` changes.
    ``ownership_mask``: the same as fp32 factors 1 and 0, [R, 1] or [1, C], only where this rank owns a part and another
    rank the rest; None elsewhere.
    """

    def __init__(self, parameter: OptimParameter, precision: Precision, seed: int, tp: TPGroup) -> None:
        """No collective. Raises UnsupportedModelError for a dtype, shape or layout that cannot be written in place."""
        self.parameter, self.precision, self.tp_rank, self.tp_size = parameter, precision, tp.rank, tp.size
        self.shard, self.name = parameter.shard, parameter.name
        self.is_owner = tp.rank == min(self.shard.replica_ranks, default=tp.rank)
        data = parameter.tensor.data
        _check(self.name, data, self.shard)
        self.is_matrix = len(self.shard.global_shape) > 1
        self.local_2d = fold(tuple(data.shape))
        self.is_flat = self.local_2d == tuple(data.shape)
        self.data = data.view(self.local_2d)
        self.remainder: Tensor | None = None
        if (rest := rounding.remainder_dtype(data.dtype, precision)) is not None:
            self.remainder = torch.zeros(self.local_2d, dtype=rest, device=data.device)
        self.owned_ranges = _owned_ranges(self.shard, tp.rank)
        self.ownership_mask: Tensor | None = None
        if self.is_owner and not all(owned for _, _, owned in self.owned_ranges):
            self.ownership_mask = _ownership_mask(self.shard, self.owned_ranges).to(data.device)
        self._seed = seed
        self.set_rounding_stream(0)

    def set_rounding_stream(self, number: int) -> None:
        """Take random bits for stochastic rounding from this stream, which ``apply`` addresses by the weight's updates."""
        self.rounding_key = stream_key(self._seed, self.name, f"rounding {number}" if number else "rounding")

    @property
    def leaf_in_backward(self) -> torch.nn.Parameter | None:
        """See ``leaf_of_complete_gradient``."""
        return leaf_of_complete_gradient(self.parameter)

    @property
    def mean_gradient_bytes(self) -> float:
        """Bytes of the gradient on an average rank: the same number on all ranks, which may hold a little more or less."""
        held = 1.0 if self.shard.dim is None else 1.0 / self.tp_size
        return math.prod(self.shard.global_shape) * self.data.element_size() * held

    def boxes(self) -> Iterator[tuple[Box, int, bool]]:
        """See ``boxes_with_owner``."""
        return boxes_with_owner(self.shard, self.tp_rank)

    def owned_square_norm(self, values: Tensor) -> Tensor:
        """Squared norm (fp32, 0-d) of the elements of local ``values`` [R, C] that this rank owns. No collective."""
        if self.ownership_mask is not None:
            values = values * self.ownership_mask
        return torch.linalg.vector_norm(values, dtype=torch.float32).square() * float(self.is_owner)

    def gradient(self) -> Tensor:
        """The local gradient [R, C] in its own dtype, whose rows are contiguous; zeros where the backward pass left none."""
        gradient = self.parameter.grad
        if gradient is None:
            return torch.zeros_like(self.data)
        if gradient.is_contiguous():
            # a step asks hundreds of weights before its first kernel starts: no view where none is needed
            return gradient if self.is_flat else gradient.view(self.local_2d)
        gradient = gradient.reshape(self.local_2d)
        return gradient if has_contiguous_rows(gradient) else gradient.contiguous()

    def apply(self, step: int, decay: float, update: Callable[[slice], Tensor]) -> None:
        """Write ``decay * weight - update(rows)`` for all rows, in place. ``update`` returns fp32 [rows, C].

        ``step`` counts this parameter's updates from 0: it addresses the random bits of stochastic rounding.
        """
        num_rows, num_columns = self.local_2d
        if self.data.numel() == 0:
            return
        stochastic = self.precision is Precision.stochastic and self.data.dtype is torch.bfloat16
        rows, columns = global_indices(self.shard, self.data.device) if stochastic else (None, None)
        chunk = max(1, _CHUNK_ELEMENTS // num_columns)
        for start in range(0, num_rows, chunk):
            part = slice(start, min(start + chunk, num_rows))
            rest = None if self.remainder is None else self.remainder[part]
            value = rounding.join(self.data[part], rest).mul_(decay).sub_(update(part))
            bits = None
            if rows is not None and columns is not None:
                bits = rounding.random_bits(self.rounding_key, step, rows[part], columns)
            rounding.store(self.data[part], rest, value, bits)


class AdamWState:
    """AdamW for what is not projected: norms, biases, small matrices, and whatever the configuration leaves to it.

    ``exp_avg`` and ``exp_avg_sq`` [R, C] (fp32, local) are sharded exactly as the weight. No collective.
    """

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.exp_avg = torch.zeros(weight.local_2d, device=weight.data.device)
        self.exp_avg_sq = torch.zeros(weight.local_2d, device=weight.data.device)

    def candidate(self, gradient: Tensor, step: int, config: OptimConfig) -> tuple[Tensor, Tensor, Tensor]:
        """(exp_avg, exp_avg_sq, update at learning rate 1), fp32 [R, C] each, after one more fp32 ``gradient`` [R, C].

        The state stays as it is. ``step`` counts the updates before this one. As in torch.optim.AdamW, eps is added to the
        bias-corrected root.
        """
        beta1, beta2 = config.betas
        m = self.exp_avg * beta1 + gradient * (1 - beta1)
        v = self.exp_avg_sq * beta2 + gradient.square() * (1 - beta2)
        corrected = (v / (1 - beta2 ** (step + 1))).sqrt_().add_(config.eps)
        return m, v, m / (1 - beta1 ** (step + 1)) / corrected


def _check(name: str, data: Tensor, shard: Shard) -> None:
    """Raise UnsupportedModelError unless local ``data`` is what ``shard`` says and can be written in place."""
    if data.dtype not in (torch.bfloat16, torch.float32):
        raise UnsupportedModelError(
            f"{name}: got weights of {data.dtype}, expected torch.bfloat16 or torch.float32; "
            "serve the model with --dtype bfloat16"
        )
    if tuple(data.shape) != shard.local_shape:
        raise UnsupportedModelError(
            f"{name}: got a local tensor of shape {tuple(data.shape)}, expected {shard.local_shape} "
            f"from global shape {shard.global_shape} cut on dimension {shard.dim}"
        )
    if data.numel() and not (has_contiguous_rows(data) and _folds_to_a_view(data)):
        raise UnsupportedModelError(
            f"{name}: got weights of shape {tuple(data.shape)} with strides {data.stride()}, expected contiguous rows "
            "(last stride 1) at even distances, since they are written where the server holds them; serve the model "
            "without options that transpose or interleave its weights"
        )


def has_contiguous_rows(tensor: Tensor) -> bool:
    """True if neighbours along the last dimension are neighbours in memory."""
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _folds_to_a_view(data: Tensor) -> bool:
    """True if one stride leads from each row of the folded tensor to the next, and rows do not overlap."""
    rows = [(n, stride) for n, stride in zip(data.shape[:-1], data.stride()[:-1], strict=True) if n > 1]
    evenly = all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(rows))
    return evenly and (not rows or rows[-1][1] >= data.shape[-1])


def _owned_ranges(shard: Shard, rank: int) -> tuple[tuple[int, int, bool], ...]:
    """(start, stop, owned): global ranges in local order, cut where it changes whether ``rank`` owns them."""
    elsewhere = [(p.start, p.start + p.length) for p in shard.replicated if p.ranks[0] != rank]
    bounds = sorted({bound for pair in elsewhere for bound in pair})
    ranges, local = [], 0
    for start, stop in shard.ranges:
        end, offset = local + stop - start, start - local
        for a, b in itertools.pairwise([local, *(bound for bound in bounds if local < bound < end), end]):
            owned = not any(low <= a and b <= high for low, high in elsewhere)
            ranges.append((a + offset, b + offset, owned))
        local = end
    return tuple(ranges)


def boxes_with_owner(shard: Shard, rank: int) -> Iterator[tuple[Box, int, bool]]:
    """What ``rank`` holds: each global box, its local offset along the cut dimension, and whether this rank owns it. A box
    is owned as a whole or not at all; over all ranks, the owned ones tile the tensor."""
    is_owner = rank == min(shard.replica_ranks, default=rank)
    if shard.dim is None:
        yield *shard.boxes[0], is_owner
        return
    local = 0
    for start, stop, owned in _owned_ranges(shard, rank):
        box, _ = replace(shard, ranges=((start, stop),)).boxes[0]
        yield box, local, owned and is_owner
        local += stop - start


def _ownership_mask(shard: Shard, owned_ranges: Sequence[tuple[int, int, bool]]) -> Tensor:
    """fp32 [R, 1] or [1, C]: 1 where an element of the folded local tensor is owned, 0 elsewhere."""
    along = torch.cat([torch.full((stop - start,), float(owned)) for start, stop, owned in owned_ranges])
    shape, dim = shard.local_shape, shard.dim
    if dim == len(shape) - 1:
        return along[None, :]
    view = [-1 if d == dim else 1 for d in range(len(shape) - 1)]
    return along.view(view).expand(shape[:-1]).reshape(-1, 1)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)] on the device, without waiting for it: a copy from memory that is not pinned waits for all work."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def fold(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, C) of a tensor whose dimensions but the last are folded into rows."""
    return math.prod(shape[:-1]), shape[-1]


def range_indices(ranges: tuple[tuple[int, int], ...], device: torch.device | str = "cpu") -> Tensor:
    """Global indices (int64, one dimension) of half-open ``ranges`` in local order."""
    return torch.cat([torch.arange(a, b, device=device) for a, b in ranges] or [torch.arange(0, device=device)])


def global_indices(shard: Shard, device: torch.device) -> tuple[Tensor, Tensor]:
    """Global row numbers [R] and column numbers [C] (int64) of the folded local tensor."""
    shape = shard.global_shape
    along = [torch.arange(n, device=device) for n in shape]
    if shard.dim is not None:
        along[shard.dim] = range_indices(shard.ranges, device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for extent, index in zip(shape[:-1], along[:-1], strict=True):
        rows = (rows[:, None] * extent + index[None, :]).flatten()
    return rows, along[-1]
