"""Fused tensors, whose rows a module splits into parts: a rank must hold its share of every part, not of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PretrainedConfig, PreTrainedModel

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.families import FUSED
from apollo_tp.shards.boxes import Shard, merge_ranges

Ranges = tuple[tuple[int, int], ...]


def refuse_wrong_cuts(
    module: PreTrainedModel, config: PretrainedConfig, shards: Mapping[str, Shard], tp: TPGroup
) -> None:
    """Raise UnsupportedModelError that lists the fused parameters among ``shards`` (by name) which are cut otherwise.

    ``module`` has this rank's width, ``config`` is that of the checkpoint. Such a cut can have the right shape: vLLM's
    Transformers backend gathers outputs before it splits them, the module here splits those of its rank.
    """
    wrong = []
    for name, shard in shards.items():
        kind = next((kind for kind in name.split(".")[-2:] if kind in FUSED), None)
        if kind is None or shard.dim is None:
            continue
        whole, local = (FUSED[kind](c) for c in (config.get_text_config(), module.config))
        expected = _shares(shard.global_shape[shard.dim], whole, shard.local_shape[shard.dim], local, tp)
        if merge_ranges(shard.ranges) != expected:
            wrong.append(
                f"{shard.name}: got {_text(shard.ranges)} of {shard.global_shape[shard.dim]} along dimension {shard.dim}, "
                f"expected {_text(expected)}, a share of each of the {len(whole)} parts that it is split into"
            )
    if wrong:
        raise UnsupportedModelError(
            f"rank {tp.rank} of {tp.size}: {len(wrong)} fused tensors of {type(module).__name__} are served cut across "
            "their parts; serve at tensor-parallel size 1, or by vLLM's own implementation (--model-impl vllm) if it has "
            "one:\n  " + "\n  ".join(wrong)
        )


def _shares(extent: int, whole: tuple[int, ...], local_extent: int, local: tuple[int, ...], tp: TPGroup) -> Ranges:
    """This rank's share of each part; ``whole`` and ``local`` are relative sizes of the parts in all and on a rank. Where
    there are fewer shares than ranks (key and value heads), neighbours hold the same."""
    ranges, start = [], 0
    for size, local_size in zip(whole, local, strict=True):
        rows, local_rows = size * extent // sum(whole), local_size * local_extent // sum(local)
        first = start + tp.rank * (rows // local_rows) // tp.size * local_rows
        ranges.append((first, first + local_rows))
        start += rows
    return merge_ranges(ranges)


def _text(ranges: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in ranges)
