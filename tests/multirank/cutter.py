"""Cut a reference model's checkpoint the way vLLM lays it out, by name: independent of the package's own tracing.

Rules: query heads, gate and up by rows; key and value heads by rows, replicated on neighbouring ranks when there are fewer
than ranks; output and down projections by columns; vocabulary padded to a multiple of 64 and cut in equal blocks, of which
only the real rows are handed out.
"""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig

from apollo_tp.layout import Shard

_COLUMN = ("q_proj", "gate_proj", "up_proj")
_ROW = ("o_proj.weight", "down_proj.weight")


def cut(
    state: dict[str, torch.Tensor], config: PretrainedConfig, rank: int, size: int
) -> dict[str, tuple[Shard, torch.Tensor]]:
    """Shard record and local copy of every checkpoint tensor in ``state`` on ``rank`` of ``size``."""
    result = {}
    for name, tensor in state.items():
        dim, ranges, replicas = _placement(name, tuple(tensor.shape), config, rank, size)
        shard = Shard(name, tuple(tensor.shape), dim, ranges, replicas)
        local = (
            tensor if dim is None else torch.cat([tensor.narrow(dim, a, b - a) for a, b in ranges] or [tensor[:0]], dim)
        )
        result[name] = shard, local.detach().clone().contiguous()
    return result


def _placement(
    name: str, shape: tuple[int, ...], config: PretrainedConfig, rank: int, size: int
) -> tuple[int | None, tuple[tuple[int, int], ...], tuple[int, ...]]:
    everyone = tuple(range(size))
    if size == 1:
        return None, (), everyone
    if "embed_tokens" in name or "lm_head" in name:
        block = math.ceil(shape[0] / 64) * 64 // size
        start, stop = min(rank * block, shape[0]), min((rank + 1) * block, shape[0])
        return 0, ((start, stop),) if stop > start else (), (rank,)
    if any(f".{part}." in name for part in _COLUMN):
        return 0, (_block(shape[0], rank, size),), (rank,)
    if ".k_proj." in name or ".v_proj." in name:
        heads = min(config.num_key_value_heads, size)
        repeat = size // heads
        head = rank // repeat
        if heads == 1:
            return None, (), everyone
        return 0, (_block(shape[0], head, heads),), tuple(range(head * repeat, (head + 1) * repeat))
    if name.endswith(_ROW):
        return 1, (_block(shape[1], rank, size),), (rank,)
    return None, (), everyone


def _block(extent: int, index: int, count: int) -> tuple[int, int]:
    return index * extent // count, (index + 1) * extent // count
