"""A rank's loop over a real trainer, and faults for one of its steps."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from apollo_tp.distributed.control import Control
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import samples
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire import commands
from tests.support.rank_services import RecordingServices
from tests.support.trainers import CONFIG, make_trainer

DEADLINE = datetime.timedelta(seconds=15)


class Loop(RankLoop):
    """A rank's loop over a real trainer. ``sent`` are rank 0's replies that no command asked for, ``noted`` the weight
    versions after failures."""

    def __init__(self, rank: int, size: int, checkpoint: Path) -> None:
        tp = TPGroup.world("gloo", DEADLINE)
        trainer, _ = make_trainer(tp, checkpoint, replace(CONFIG, check_replicas_every=3))
        self.sent: list[commands.AnyReply] = []
        link = SimpleNamespace(send=self.sent.append, working_on=lambda *_: None) if rank == 0 else None
        services = RecordingServices(form_group=lambda: tp.form("gloo", DEADLINE))
        self.noted = services.failures
        super().__init__(trainer, services, Control(rank, size), link)  # type: ignore[arg-type]

    def step(self, number: int) -> commands.AnyReply:
        return self.execute(commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=samples(seed=number)))


def once(owner: object, name: str, change: Callable[..., object]) -> None:
    """Let the next call of a method be ``change(method, *arguments)``."""
    method = getattr(owner, name)

    def call(*arguments: object, **options: object) -> object:
        setattr(owner, name, method)
        return change(method, *arguments, **options)

    setattr(owner, name, call)


def out_of_memory(*_: object, **__: object) -> None:
    """Raise an out-of-memory error, whatever the arguments."""
    raise torch.OutOfMemoryError("injected")


def in_forward(trainer: Trainer) -> None:
    """The next forward pass runs out of memory."""
    once(trainer.model, "forward_loss", out_of_memory)
