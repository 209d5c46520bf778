"""A check that ranks which hold the same part of a weight hold the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apollo_tp.errors import ReplicaError
from apollo_tp.optim.weight import Weight
from apollo_tp.parallel import TPGroup

_CHUNK_ELEMENTS = 1 << 22


def check_replicas(weights: Sequence[Weight], tp: TPGroup) -> None:
    """Compare a checksum of every replicated weight and its remainder over its replicas.

    Collectives: one all-gather of 3 int64 per weight. Raises ReplicaError on all ranks alike if bits differ.
    """
    if tp.size == 1:
        return
    own = torch.stack([_record(weight, tp.rank) for weight in weights])
    gathered = tp.all_gather(own).view(tp.size, len(weights), 3).cpu()
    for i, weight in enumerate(weights):
        for group in gathered[:, i, 0].unique().tolist():
            ranks = (gathered[:, i, 0] == group).nonzero().flatten().tolist()
            sums = [tuple(gathered[rank, i, 1:].tolist()) for rank in ranks]
            if len(set(sums)) > 1:
                raise ReplicaError(
                    f"{weight.name}: got checksums {sums} on ranks {ranks}, expected one value, since they hold the same "
                    "part; a gradient was not summed over replicas, or one rank's memory was written from outside"
                )


def _record(weight: Weight, rank: int) -> Tensor:
    """int64 (lowest rank with the same content, sum of bits, position-weighted sum of bits)."""
    group = torch.tensor(min(weight.shard.replica_ranks, default=rank), device=weight.data.device)
    if len(weight.shard.replica_ranks) < 2:
        return torch.stack([group, torch.zeros_like(group), torch.zeros_like(group)])
    plain, placed = torch.zeros_like(group), torch.zeros_like(group)
    for tensor in (weight.data, weight.remainder):
        if tensor is None:
            continue
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
        for chunk in tensor.contiguous().view(integers).flatten().split(_CHUNK_ELEMENTS):
            bits = chunk.long()
            plain += bits.sum()
            # weights below 2**12 keep the sum of 2**22 products of 32-bit numbers within int64
            placed += (bits * (torch.arange(bits.numel(), device=bits.device) % 4093 + 1)).sum() % (1 << 40)
    return torch.stack([group, plain, placed])
