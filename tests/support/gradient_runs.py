"""Trainers whose gradients are measured: how many bytes of them live at once, and all that a step changes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from apollo_tp.config import GradientMode, OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import map_copy
from apollo_tp.model import bind_model
from apollo_tp.optim import Optimizer
from apollo_tp.optim import in_backward as updates_in_backward
from apollo_tp.training.trainer import Trainer
from tests.support.families import CASES

CONFIG = OptimConfig(
    rank=8, lr=1e-3, max_relative_update=1.0, max_grad_norm=None, refresh_every=2, check_replicas_every=1
)
ONE_BATCH, SEVERAL = (20, 11, 17), (60, 58)
"""Lengths of samples that fit in one micro-batch, and of samples that do not."""
MICRO_BATCH = 64


class Run:
    """A trainer over memory of this process. ``peak`` is the most bytes of gradients that lived at once."""

    def __init__(
        self, tp: TPGroup, folder: Path, name: str, mode: GradientMode, config: OptimConfig = CONFIG, **options: object
    ) -> None:
        updates_in_backward.BUCKET_BYTES = (
            1  # these models would fit in one bucket: a leaf each, so that memory and order show
        )
        case = CASES[name]
        mapped = map_copy(folder / case.checkpoint, tp)
        self.tensors = mapped.tensors
        model = bind_model(
            AutoConfig.from_pretrained(folder / case.checkpoint),
            self.tensors,
            tp,
            fused_tensors=mapped.fused_tensors,
            gradient_checkpointing=case.gradient_checkpointing,
        )
        self.leaves = list({id(p.leaf): p.leaf for p in model.parameters}.values())
        self.trainer = Trainer(
            model,
            Optimizer(config, Precision.remainder, model.parameters, tp),
            tp,
            device=torch.device("cpu"),
            max_micro_batch_tokens=MICRO_BATCH,
            gradients=mode,
            **options,  # type: ignore[arg-type]
        )
        self.peak = 0
        for leaf in self.leaves:  # after the trainer's own hooks
            leaf.register_post_accumulate_grad_hook(self._measure)

    def _measure(self, _: nn.Parameter) -> None:
        self.peak = max(self.peak, sum(leaf.grad.nbytes for leaf in self.leaves if leaf.grad is not None))

    def leaf(self, name: str) -> nn.Parameter:
        return next(p.leaf for p in self.trainer.model.parameters if p.name == name)

    def values(self) -> dict[str, Tensor]:
        return {name: local.clone() for name, (_, local) in self.tensors.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def state(run: Run) -> dict[str, Tensor]:
    """Everything that a step changes: served values, moments, remainders, counters."""
    group = run.trainer.optimizer.update_group
    moments = {f"moment {i}": t.clone() for i, g in enumerate(group.groups) for t in (g.exp_avg, g.exp_avg_sq)}
    moments |= {f"adamw {i}": t.clone() for i, a in enumerate(group.adamw.values()) for t in (a.exp_avg, a.exp_avg_sq)}
    rests = {f"rest of {w.name}": w.remainder.clone() for w in group.weights if w.remainder is not None}
    counted = {"steps": torch.tensor(group.steps), "norms": group.counters.limiter_norms.clone()}
    return run.values() | moments | rests | counted
