"""Served memory without a server: the manifests of a traced case over memory of this process, filled from its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from safetensors import safe_open

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import MappedRank, map_rank, verify_against_checkpoint


def map_case(checkpoint: Path, tp: TPGroup) -> MappedRank:
    """What a trainer rank would map of a server of ``checkpoint`` at this size, with the checkpoint's values in it. The
    folder may have been moved since it was traced."""
    manifests = read_instance(checkpoint / f"tp{tp.size}")
    mine = manifests[tp.rank]
    allocations = []
    for allocation in mine.allocations:
        descriptor = os.memfd_create("served")
        os.ftruncate(descriptor, allocation.num_bytes)
        allocations.append(msgspec.structs.replace(allocation, handle=str(descriptor)))
    manifests[tp.rank] = msgspec.structs.replace(
        mine, pid=os.getpid(), model_path=str(checkpoint), allocations=allocations
    )
    mapped = map_rank(manifests, tp.rank)
    files = {t.name: t.file for t in mine.checkpoint}
    for name, (shard, local) in mapped.tensors.items():
        with safe_open(checkpoint / files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        for box, start in shard.boxes:
            index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            target = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
            target.copy_(tensor[index])
    assert verify_against_checkpoint(mapped, -1) == len(mapped.tensors)
    for descriptor in (int(a.handle) for a in allocations):
        os.close(descriptor)
    return mapped
