"""Served memory as a trainer rank maps it, of a live server."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import bind_model
from apollo_tp.model.batch import pack
from apollo_tp.model.build import as_served
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import map_rank
from apollo_tp.wire.commands import Sample


def trainer_logprobs(tp: TPGroup, manifests: list[Manifest], samples: list[Sample]) -> list[float]:
    """The trainer's log-probability (nats) of each token but the first of the first sample, over a live server's memory."""
    mapped = map_rank(manifests, tp.rank)
    config = AutoConfig.from_pretrained(manifests[0].model_path)
    config = as_served(config, manifests[0].config_overrides, manifests[0].max_model_len)
    bound = bind_model(config, mapped.tensors, tp, fused_tensors=mapped.fused_tensors)
    (batch,) = pack(samples, 1024)
    with torch.no_grad():
        return bound.sequence_logprobs(batch).tokens[: len(samples[0].token_ids) - 1].tolist()
