"""Samples to packed micro-batches: identical on every rank, no padding.

The sequences of a micro-batch are concatenated; ``cu_seqlens`` says where each begins, position ids restart at 0, and the
weight of predicting across a boundary is 0, so that nothing of one sequence reaches another.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apollo_tp.errors import RequestError
from apollo_tp.wire.commands import PreferencePair, Sample

_TENSORS = ("token_ids", "position_ids", "cu_seqlens", "targets", "weights", "loss_positions")


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of S sequences with T tokens in all. The same on every rank.

    ``token_ids``, ``position_ids`` and ``targets`` are int64 [T], ``weights`` fp32 [T], ``cu_seqlens`` int32 [S + 1].
    ``targets[t]`` is the token that position t predicts and ``weights[t]`` the loss weight of doing so (0 at the last
    position of a sequence); ``loss_positions`` int64 [N] are the positions with a weight. ``sample_index[s]`` is the index
    of sequence s in the list that was packed.
    """

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    weights: Tensor
    loss_positions: Tensor
    sample_index: tuple[int, ...]
    lengths: tuple[int, ...]
    weight_sum: float

    @property
    def num_loss_tokens(self) -> int:
        return len(self.loss_positions)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def structure(self) -> tuple[tuple[int, ...], int]:
        """Lengths and number of loss tokens, which determine the shapes of all that is computed from this batch."""
        return self.lengths, self.num_loss_tokens

    def scaled(self, factor: float) -> PackedBatch:
        """The same batch with ``factor`` times its weights."""
        return replace(self, weights=factor * self.weights, weight_sum=factor * self.weight_sum)

    def with_weights(self, weights: Tensor) -> PackedBatch:
        """The same batch with other weights, fp32 [T], which are 0 wherever they were. ``weight_sum`` stays that of the
        samples."""
        return replace(self, weights=weights)

    def sequence_of_token(self) -> Tensor:
        """For each token, the number of its sequence in this batch: int64 [T]."""
        numbers = torch.arange(len(self.lengths), device=self.token_ids.device)
        return torch.repeat_interleave(numbers, self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def copy_(self, other: PackedBatch) -> None:
        """Copy the tensors of a batch of the same structure into those of this batch, without waiting for the device."""
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)


def pack(samples: Sequence[Sample], max_tokens: int, part: int = 0, parts: int = 1) -> list[PackedBatch]:
    """Micro-batches of at most ``max_tokens`` tokens that hold every sample once: first-fit decreasing, ties by index.

    With ``parts``, only the samples of ``part``, which may be none: see ``divide``. Depends only on the arguments, so all
    ranks that hold one part pack it identically. Raises RequestError, whatever the part, for a sample that is empty, longer
    than ``max_tokens``, or whose weights do not fit its tokens.
    """
    for index, sample in enumerate(samples):
        _check(f"samples[{index}]", sample, max_tokens)
    lengths = [len(sample.token_ids) for sample in samples]
    own = divide(lengths, parts)[part]
    bins = _first_fit([lengths[i] for i in own], max_tokens)
    return [_packed(samples, sorted(own[i] for i in members)) for members in bins]


def divide(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of ``lengths`` in ``parts`` lists, each ascending, of about the same sum: the longest first, to the list that
    has least."""
    result: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = held.index(min(held))
        result[place].append(index)
        held[place] += lengths[index]
    return [sorted(indices) for indices in result]


def pack_pairs(pairs: Sequence[PreferencePair], max_tokens: int, part: int = 0, parts: int = 1) -> list[PackedBatch]:
    """Like ``pack``, with both sides of a pair in one micro-batch, the rejected one directly after the preferred one.

    ``sample_index`` is 2 i for the preferred and 2 i + 1 for the rejected side of pair i. Raises RequestError as ``pack``
    does, and for a pair with more than ``max_tokens`` tokens in both sides.
    """
    sides = [side for pair in pairs for side in (pair.preferred, pair.rejected)]
    lengths = [len(p.preferred.token_ids) + len(p.rejected.token_ids) for p in pairs]
    for index, (pair, length) in enumerate(zip(pairs, lengths, strict=True)):
        field = f"pairs[{index}]"
        _check(f"{field}.preferred", pair.preferred, max_tokens)
        _check(f"{field}.rejected", pair.rejected, max_tokens)
        if length > max_tokens:
            raise RequestError(f"{field}: got {length} tokens in both sides, expected 2 to {max_tokens}", field=field)
    own = divide(lengths, parts)[part]
    bins = _first_fit([lengths[i] for i in own], max_tokens)
    return [
        _packed(sides, [side for i in sorted(own[i] for i in members) for side in (2 * i, 2 * i + 1)])
        for members in bins
    ]


def _first_fit(lengths: Sequence[int], room_per_bin: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins whose lengths sum up to at most ``room_per_bin``; longest first, ties by index."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(room_per_bin)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def empty_share(num_tokens: int, num_batches: int, max_tokens: int) -> float:
    """The share of the micro-batches' token budget that no sample filled (packing adds no padding tokens)."""
    budget = max_tokens * num_batches
    return 1.0 - num_tokens / budget if budget else 0.0


def _check(field: str, sample: Sample, max_tokens: int) -> None:
    """Raise RequestError that names ``field`` unless ``sample`` can be packed."""
    length = len(sample.token_ids)
    if not 1 <= length <= max_tokens:
        raise RequestError(f"{field}: got {length} tokens, expected 1 to {max_tokens}", field=field)
    if len(sample.weights) != length:
        raise RequestError(
            f"{field}: got {len(sample.weights)} weights, expected one per token ({length})", field=field
        )
    if sample.weights[0] != 0:
        raise RequestError(
            f"{field}: got weights[0]={sample.weights[0]}, expected 0 (nothing predicts it)", field=field
        )


def _packed(samples: Sequence[Sample], members: list[int]) -> PackedBatch:
    """The micro-batch of ``samples`` with the indices ``members``, in this order, on the CPU."""
    chosen = [samples[i] for i in members]
    lengths = tuple(len(sample.token_ids) for sample in chosen)
    cu_seqlens = torch.zeros(len(members) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    # Through array: the device waits for this at the start of a step, and torch.tensor takes several times as long.
    token_ids = torch.frombuffer(
        array("q", itertools.chain.from_iterable(s.token_ids for s in chosen)), dtype=torch.int64
    )
    weights = torch.frombuffer(
        array("d", itertools.chain.from_iterable(s.weights for s in chosen)), dtype=torch.float64
    )
    last = cu_seqlens[1:].long() - 1
    targets, weights = token_ids.roll(-1), weights.roll(-1)  # nothing predicts the first token of a sequence
    targets[last], weights[last] = 0, 0.0
    return PackedBatch(
        token_ids=token_ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        targets=targets,
        weights=weights.float(),
        loss_positions=weights.nonzero()[:, 0],
        sample_index=tuple(members),
        lengths=lengths,
        weight_sum=math.fsum(itertools.chain.from_iterable(s.weights for s in chosen)),
    )
