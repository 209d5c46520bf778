"""Ranks that hold the same part of a weight must hold the same bits: the check, and the repair after a killed write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CollectiveError, ReplicaError
from apollo_tp.optim.parameters import Weight

_CHUNK_ELEMENTS = 1 << 22
COLUMNS = 5
"""Of a record: weight (-1 is padding), lowest rank that holds the part, its global start, and two checksums."""

Part = tuple[int, int, int]
"""A part that several ranks hold: the weight's index in the list, the lowest of these ranks, its global start."""


def check_replicas(weights: Sequence[Weight], tp: TPGroup) -> None:
    """Compare checksums of everything that more than one rank holds, weights and remainders, whole or in part.

    Collectives: one all-gather of the number of replicated parts, one of COLUMNS int64 for each. Raises ReplicaError on all
    ranks if bits differ, CollectiveError if a gather did not happen.
    """
    for (index, *_), sums in _differing(weights, tp):
        raise ReplicaError(
            f"{weights[index].name}: got checksums {list(sums.values())} on ranks {list(sums)}, expected one value, "
            "since they hold the same part; a gradient was not summed over replicas, or one rank's memory was written "
            "from outside"
        )


def resync_replicas(weights: Sequence[Weight], tp: TPGroup, replicas: TPGroup) -> list[str]:
    """Where replicas differ, give every rank the bits of the lowest rank that holds them: when a trainer is killed as it
    writes, some ranks may have written and others not. Returns the names of these weights, the same on all ranks.

    A weight is written only with bits that have the lowest rank's checksums, and only when all ranks have received such.
    Collectives: those of ``check_replicas``, and per part that differs one all-reduce over the ranks that hold it for each
    tensor, and one all-gather over all; with several ``replicas`` of the model, one all-gather over them. Raises
    CollectiveError if one of them did not happen.
    """
    own = {(index, lowest, start): views for index, w in enumerate(weights) for lowest, start, views in _shared(w)}
    differing, tensor_device = _differing(weights, tp), weights[0].data.device
    _form_holders({tuple(sorted(sums)) for _, sums in differing}, tp, replicas, tensor_device)
    for part, sums in differing:
        holders = tp.subgroup(tuple(sorted(sums)))
        views = own.get(part, [])
        copies = [_bits_of_lowest(view, holders) for view in views]  # inference reads ``view`` all the while
        right = not views or tuple(checksums(copies).tolist()) == sums[part[1]]
        name = weights[part[0]].name
        answers = tp.gather_checked(torch.tensor([right], dtype=torch.int64, device=tensor_device), f"repair of {name}")
        if wrong := (answers[:, 0] != 1).nonzero().flatten().tolist():
            raise CollectiveError(
                f"{name}: got other bits on ranks {wrong} than rank {part[1]} sent, expected its checksums {sums[part[1]]}; "
                "nothing of it was written. Start the trainer again"
            )
        for view, bits in zip(views, copies, strict=True):
            view.copy_(bits)
    return sorted({weights[index].name for (index, *_), _ in differing})


def _form_holders(wanted: set[tuple[int, ...]], tp: TPGroup, replicas: TPGroup, device: torch.device) -> None:
    """Make the groups of the ``wanted`` ranks of ``tp``, and those that other replicas of the model want: a new process
    group is collective over all ranks, and each replica has parts of its own that differ."""
    answers = ComputeControl(replicas, device).gather(msgspec.json.encode(sorted(wanted)))
    for ranks in sorted({tuple(ranks) for answer in answers for ranks in msgspec.json.decode(answer)}):
        tp.subgroup(ranks)


def _bits_of_lowest(view: Tensor, holders: TPGroup) -> Tensor:
    """A copy of ``view`` on the lowest rank of ``holders``, on all of them. One all-reduce."""
    bits = view.clone(memory_format=torch.contiguous_format)
    if holders.rank > 0:
        bits.view(torch.uint8).zero_()  # a sum of bytes with zeros keeps them
    holders.all_reduce_(bits.view(torch.uint8))
    return bits


def _differing(weights: Sequence[Weight], tp: TPGroup) -> list[tuple[Part, dict[int, tuple[int, ...]]]]:
    """Parts whose checksums are not the same on the ranks that hold them, with those of each rank; the same on all ranks.

    Collectives: those of ``check_replicas``.
    """
    if tp.size == 1:
        return []
    device = weights[0].data.device
    rows = [row for index, weight in enumerate(weights) for row in _records(index, weight)]
    count = int(tp.gather_checked(torch.tensor(len(rows), device=device), "number of replicated parts").max())
    own = torch.full((count, COLUMNS), -1, dtype=torch.int64, device=device)
    if rows:
        own[: len(rows)] = torch.stack(rows)
    holders: dict[Part, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for rank, records in enumerate(tp.gather_checked(own, "checksums of replicated parts").tolist()):
        for index, lowest, start, plain, weighted in records:
            holders[index, lowest, start][rank] = plain, weighted
    return [(part, sums) for part, sums in sorted(holders.items()) if part[0] >= 0 and len(set(sums.values())) > 1]


def _records(index: int, weight: Weight) -> Iterator[Tensor]:
    """int64 [COLUMNS] for each part of the weight at ``index`` that other ranks hold too."""
    for lowest, start, tensors in _shared(weight):
        key = torch.tensor([index, lowest, start], device=weight.data.device)
        yield torch.cat([key, checksums(tensors)])


def _shared(weight: Weight) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(lowest rank that holds it, global start along the cut, local views of weight and remainder) of each part."""
    shard = weight.shard
    views = [t.view(shard.local_shape) for t in (weight.data, weight.remainder) if t is not None]
    if len(shard.replica_ranks) > 1:
        yield min(shard.replica_ranks), 0, views
        return
    for part in shard.replicated:
        assert shard.dim is not None
        local = 0
        for start, stop in shard.ranges:  # neighbours in memory here may lie apart elsewhere: by global range
            first, last = max(part.start, local), min(part.start + part.length, local + stop - start)
            if first < last:
                views_of_part = [view.narrow(shard.dim, first, last - first) for view in views]
                yield min(part.ranks), start + first - local, views_of_part
            local += stop - start


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [2]: sum of bits, position-weighted sum of bits. Local."""
    plain, weighted = torch.zeros(2, dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
        for chunk in tensor.contiguous().view(integers).flatten().split(_CHUNK_ELEMENTS):
            bits = chunk.long()
            plain += bits.sum()
            # weights below 2**12 keep the sum of 2**22 products of 32-bit numbers within int64
            weighted += (bits * (torch.arange(bits.numel(), device=bits.device) % 4093 + 1)).sum() % (1 << 40)
    return torch.stack([plain, weighted])
