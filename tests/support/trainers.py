"""Trainers over memory of this process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import map_copy, samples
from apollo_tp.model import bind_model
from apollo_tp.optim import Optimizer
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import PreferencePair

CASE = "qwen3"
CONFIG = OptimConfig(rank=8, lr=1e-3, max_relative_update=1.0)


def make_trainer(
    tp: TPGroup, checkpoint: Path, config: OptimConfig = CONFIG, mesh: Mesh | None = None
) -> tuple[Trainer, dict]:
    """A trainer over memory of this process, and the mapped tensors by name. ``tp`` is the group of one replica."""
    mapped = map_copy(checkpoint, tp)
    model = bind_model(AutoConfig.from_pretrained(checkpoint), mapped.tensors, tp, fused_tensors=mapped.fused_tensors)
    optimizer = Optimizer(config, Precision.remainder, model.parameters, tp, mesh.replicas if mesh else None)
    trainer = Trainer(model, optimizer, tp, mesh=mesh, device=torch.device("cpu"), max_micro_batch_tokens=64)
    return trainer, mapped.tensors


def preference_pairs() -> list[PreferencePair]:
    """Three pairs, with log-probabilities of a reference that are made up."""
    batch = samples(lengths=(20, 11, 17, 9, 23, 14))
    return [PreferencePair(batch[i], batch[i + 1], -10.0 - i, -12.0 + i) for i in (0, 2, 4)]
