"""Served memory as a trainer rank maps it: without a server, over memory of this process, or that of a live one."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from transformers import AutoConfig

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import bind_model
from apollo_tp.model.batch import pack
from apollo_tp.model.build import as_served
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import MappedRank, map_rank, verify_against_checkpoint
from apollo_tp.wire.commands import Sample


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


def trainer_logprobs(tp: TPGroup, manifests: list[Manifest], samples: list[Sample]) -> list[float]:
    """The trainer's log-probability (nats) of each token but the first of the first sample, over a live server's memory."""
    mapped = map_rank(manifests, tp.rank)
    config = AutoConfig.from_pretrained(manifests[0].model_path)
    config = as_served(config, manifests[0].config_overrides, manifests[0].max_model_len)
    bound = bind_model(config, mapped.tensors, tp, fused_tensors=mapped.fused_tensors)
    (batch,) = pack(samples, 1024)
    with torch.no_grad():
        return bound.sequence_logprobs(batch).tokens[: len(samples[0].token_ids) - 1].tolist()
