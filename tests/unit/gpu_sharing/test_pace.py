"""Pace: how long it sleeps, told by a clock of the test's own, and where it hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.gpu_sharing.pace import Pace
from apollo_tp.model.build import build_on_meta
from apollo_tp.model.compiled import decoder_layers
from tests.support.families import FAMILIES

FORWARD, BACKWARD, REST = 2.0, 5.0, 1.0
"""Seconds of a layer's forward and backward work, and of what comes after the backward pass."""


class Machine:
    """Time that passes when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


class Work(torch.autograd.Function):
    """The identity, at the price of time on a machine."""

    @staticmethod
    def forward(ctx, hidden: Tensor, machine: Machine) -> Tensor:
        ctx.machine = machine
        machine.now += FORWARD
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.machine.now += BACKWARD
        return gradient, None


class Layer(GradientCheckpointingLayer):
    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def forward(self, hidden: Tensor) -> Tensor:
        return Work.apply(hidden, self.machine)


def paced(share: float) -> tuple[Machine, nn.Sequential, Pace]:
    machine = Machine()
    module = nn.Sequential(Layer(machine), Layer(machine), Layer(machine))
    clock = {"clock": lambda: machine.now, "sleep": machine.sleep}
    return machine, module, Pace(share, module, TPGroup.single(), torch.device("cpu"), **clock)


def step(machine: Machine, module: nn.Module, pace: Pace) -> None:
    pace.begin()
    loss = module(torch.ones(3, requires_grad=True)).sum()
    loss.backward()
    machine.now += REST
    pace.give_way()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_each_burst_is_followed_by_its_share_of_sleep(share: float) -> None:
    """Three layers forward, the two between which backward hooks fall, and the lowest one with what follows it."""
    machine, module, pace = paced(share)
    machine.now += 50.0  # before the command: not the trainer's work
    begun = machine.now
    step(machine, module, pace)
    bursts = [FORWARD] * 3 + [0.0] + [BACKWARD] * 2 + [BACKWARD + REST]
    assert machine.slept == pytest.approx([burst * (1 / share - 1) for burst in bursts])
    assert sum(bursts) / (machine.now - begun) == pytest.approx(share)


def test_scoring_is_paced_as_well() -> None:
    """A forward pass without gradients has its bursts too, and leaves no hook behind."""
    machine, module, pace = paced(0.5)
    pace.begin()
    with torch.no_grad():
        module(torch.ones(3))
    assert machine.slept == [FORWARD] * 3


def test_nothing_is_slept_while_the_server_stands_still() -> None:
    """From ``hold`` to the next command; the wait for the pause is nobody's work."""
    machine, module, pace = paced(0.5)
    pace.begin()
    pace.suspend()
    machine.now += 30.0
    module(torch.ones(3, requires_grad=True)).sum().backward()
    pace.give_way()
    assert machine.slept == []
    step(machine, module, pace)
    assert sum(machine.slept) == 3 * (FORWARD + BACKWARD) + REST


def test_full_speed_hooks_nothing() -> None:
    """A share of 1 costs nothing: no hook, no wait."""
    machine, module, pace = paced(1.0)
    step(machine, module, pace)
    assert machine.slept == []
    assert not any(layer._forward_hooks for layer in module)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_its_layers_found(name: str) -> None:
    """As many as the model has, whatever they are called."""
    module = build_on_meta(FAMILIES[name].config(), 1, torch.float32)
    assert len(decoder_layers(module)) == module.config.get_text_config().num_hidden_layers
