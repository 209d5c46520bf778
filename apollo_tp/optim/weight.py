"""One trained tensor of this rank: its rows and columns in the checkpoint tensor, and how an fp32 result is written."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from apollo_tp.config import Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.optim import rounding
from apollo_tp.optim.interface import OptimParameter
from apollo_tp.optim.projection import stream_key
from apollo_tp.shards.boxes import Box, Shard

_CHUNK_ELEMENTS = 1 << 24
"""Elements written at a time by the plain torch path, to bound its fp32 temporaries to some hundred MB."""


class Weight:
    """LOCAL tensor ``data`` seen as (rows, columns): all dimensions but the last are folded into rows.

    ``index`` is its place within its bundle; ``at`` gives the same weight another one.

    Sums over ranks count each element on the lowest rank that holds it: ``represents`` is True there for all of the content,
    but for what other ranks hold too, if that is a part. ``spans`` are the ranges of the shard, cut where it changes whether
    they are counted here: (global start, stop, counted). ``counted`` is the same as factors 1 and 0, fp32, (rows, 1) or
    (1, columns), only where a part of what this rank represents is counted on another; None elsewhere.
    ``is_matrix`` is False for tensors of one dimension: no weight decay, no limit on the size of a step.
    """

    def __init__(self, parameter: OptimParameter, precision: Precision, seed: int, tp: TPGroup) -> None:
        self.index, self.parameter, self.tp_size, rank = 0, parameter, tp.size, tp.rank
        self.shard = parameter.shard
        self.name = parameter.name
        self.represents = rank == min(self.shard.replica_ranks, default=rank)
        data = parameter.tensor.data
        if data.dtype not in (torch.bfloat16, torch.float32):
            raise UnsupportedModelError(
                f"{self.name}: got weights of {data.dtype}, expected torch.bfloat16 or torch.float32; "
                "serve the model with --dtype bfloat16"
            )
        if tuple(data.shape) != self.shard.local_shape:
            raise UnsupportedModelError(
                f"{self.name}: got a local tensor of shape {tuple(data.shape)}, expected {self.shard.local_shape} "
                f"from global shape {self.shard.global_shape} cut on dimension {self.shard.dim}"
            )
        self.is_matrix = len(self.shard.global_shape) > 1
        self.local_2d = fold(tuple(data.shape))
        self.is_flat = self.local_2d == tuple(data.shape)
        self.data = data.view(self.local_2d)
        self.precision = precision
        self.remainder: Tensor | None = None
        if rounding.needs_remainder(data.dtype, precision):
            self.remainder = torch.zeros(self.local_2d, dtype=torch.int8, device=data.device)
        self.spans = _spans(self.shard, rank)
        self.counted: Tensor | None = None
        if self.represents and not all(counted for _, _, counted in self.spans):
            self.counted = _factors(self.shard, self.spans).to(data.device)
        self.rounding_key = stream_key(seed, self.name, "rounding")

    @property
    def fused_leaf(self) -> torch.nn.Parameter | None:
        """The leaf whose hook may update this weight; None if its gradient may still have to be summed over ranks."""
        replicated = self.shard.replicated or len(self.shard.replica_ranks) > 1
        return None if replicated else self.parameter.complete_leaf

    @property
    def share_bytes(self) -> float:
        """Bytes of the gradient on an average rank: the same on all ranks, which may hold a little more or less."""
        held = 1.0 if self.shard.dim is None else 1.0 / self.tp_size
        return math.prod(self.shard.global_shape) * self.data.element_size() * held

    def boxes(self) -> Iterator[tuple[Box, int, bool]]:
        """(global box, local offset along the cut dimension, counted on this rank) of each span."""
        if self.shard.dim is None:
            yield *self.shard.boxes[0], self.represents
            return
        local = 0
        for start, stop, counted in self.spans:
            box, _ = replace(self.shard, ranges=((start, stop),)).boxes[0]
            yield box, local, counted and self.represents
            local += stop - start

    def square_norm(self, values: Tensor) -> Tensor:
        """Squared norm (0-d fp32) of what this rank counts of (rows, columns) ``values``."""
        if self.counted is not None:
            values = values * self.counted
        return torch.linalg.vector_norm(values, dtype=torch.float32).square() * float(self.represents)

    def at(self, index: int) -> Weight:
        """This weight, its memory and remainder shared, at another place."""
        other = copy.copy(self)
        other.index = index
        return other

    def gradient(self) -> Tensor:
        """The local gradient as (rows, columns); zeros where backward left none."""
        gradient = self.parameter.grad
        if gradient is None:
            return torch.zeros_like(self.data)
        if self.is_flat and gradient.is_contiguous():  # for hundreds of them before the first launch of a step
            return gradient
        return gradient.view(self.local_2d) if gradient.is_contiguous() else gradient.reshape(self.local_2d)

    def apply(self, step: int, decay: float, update: Callable[[slice], Tensor]) -> None:
        """Write ``decay * weight - update(rows)`` for all rows, in place. ``update`` returns fp32 (rows, columns).

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


def _spans(shard: Shard, rank: int) -> tuple[tuple[int, int, bool], ...]:
    """Global ranges in local order, cut where it changes whether ``rank`` is the lowest that holds them."""
    elsewhere = [(p.start, p.start + p.length) for p in shard.replicated if p.ranks[0] != rank]
    bounds = sorted({bound for pair in elsewhere for bound in pair})
    spans, local = [], 0
    for start, stop in shard.ranges:
        end, offset = local + stop - start, start - local
        for a, b in itertools.pairwise([local, *(bound for bound in bounds if local < bound < end), end]):
            counted = not any(low <= a and b <= high for low, high in elsewhere)
            spans.append((a + offset, b + offset, counted))
        local = end
    return tuple(spans)


def _factors(shard: Shard, spans: Sequence[tuple[int, int, bool]]) -> Tensor:
    """1 where an element of the local tensor folded to two dimensions is counted, 0 elsewhere; it broadcasts to it."""
    along = torch.cat([torch.full((stop - start,), float(counted)) for start, stop, counted in spans])
    shape, dim = shard.local_shape, shard.dim
    if dim == len(shape) - 1:
        return along[None, :]
    view = [-1 if d == dim else 1 for d in range(len(shape) - 1)]
    return along.view(view).expand(shape[:-1]).reshape(-1, 1)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(len(values),) on the device, without waiting for it: a copy from memory that is not pinned waits for all work."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def fold(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor whose dimensions but the last are folded into rows."""
    return math.prod(shape[:-1]), shape[-1]


def range_indices(ranges: tuple[tuple[int, int], ...], device: torch.device | str = "cpu") -> Tensor:
    """Global indices, int64, of half-open ``ranges`` in local order."""
    return torch.cat([torch.arange(a, b, device=device) for a, b in ranges] or [torch.arange(0, device=device)])


def global_indices(shard: Shard, device: torch.device) -> tuple[Tensor, Tensor]:
    """Global row and column numbers (int64) of the local tensor folded to two dimensions."""
    shape = shard.global_shape
    along = [torch.arange(n, device=device) for n in shape]
    if shard.dim is not None:
        along[shard.dim] = range_indices(shard.ranges, device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for extent, index in zip(shape[:-1], along[:-1], strict=True):
        rows = (rows[:, None] * extent + index[None, :]).flatten()
    return rows, along[-1]
