"""ForwardBackward and OptimizerStep: gradients of several commands are summed, and written with options of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_tp.config import OptimConfig, Schedule
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import samples
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import codec, commands
from apollo_tp.wire.commands import Sample
from tests.support.families import CASES
from tests.support.policy_twin import loss_of, sampled_batch
from tests.support.rank_services import RecordingServices
from tests.support.ranks import run_ranks
from tests.support.trainers import CASE, CONFIG, make_trainer

OTHER = OptimConfig(
    rank=8, lr=1e-9, max_relative_update=1.0, betas=(0.5, 0.7), eps=1e-6, weight_decay=0.3, max_grad_norm=0.5
)


def _weighted(batch: list[Sample], factor: float) -> list[Sample]:
    return [msgspec.structs.replace(s, weights=[factor * weight for weight in s.weights]) for s in batch]


def _execute(loop: RankLoop, command: commands.AnyCommand) -> commands.AnyReply:
    """Over the wire, both ways."""
    return codec.decode(
        codec.encode(loop.execute(codec.decode(codec.encode(command), commands.AnyCommand))), commands.AnyReply
    )


def _loop(world: TPGroup, tp_size: int, checkpoint: Path, config: OptimConfig) -> tuple[RankLoop, dict]:
    mesh = Mesh.build(world, tp_size)
    trainer, tensors = make_trainer(mesh.tp, checkpoint, config, mesh)
    return RankLoop(trainer, RecordingServices(), Control(world.rank, world.size), None), tensors


def _step(number: int, passes: int, **options: object) -> commands.OptimizerStep:
    return commands.OptimizerStep(
        id=f"j/{number}",
        job_id="j",
        job_step=number,
        num_passes=passes,
        num_samples=7,
        **options,  # type: ignore[arg-type]
    )


def _both_ways(world: TPGroup, tp_size: int, checkpoint: Path) -> list[dict[str, float]]:
    """Relative differences of weights between steps and their parts, for two steps; the second has options of its own."""
    whole, expected = _loop(world, tp_size, checkpoint, CONFIG)
    parts, got = _loop(world, tp_size, checkpoint, replace(OTHER, lr=CONFIG.lr))
    start = {name: tensor.clone() for name, (_, tensor) in expected.items()}
    differences = []
    for number in (1, 2):
        batch = samples(seed=number)
        total = sum(sum(sample.weights) for sample in batch)
        reply = _execute(whole, commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=batch))
        # signed weights that cancel each other, and the rest
        for passes, part in enumerate((batch[:3], _weighted(batch[:3], -0.5), _weighted(batch[:3], 0.5), batch[3:]), 1):
            done = _execute(parts, commands.ForwardBackward(id=f"f/{passes}", samples=_weighted(part, 1 / total)))
            assert isinstance(done, commands.ForwardBackwardDone), done
            assert done.num_passes == passes
            assert isinstance(_execute(parts, commands.Score(id="s", samples=batch[:1])), commands.ScoreDone)
        configured = {"betas": CONFIG.betas, "eps": CONFIG.eps, "weight_decay": CONFIG.weight_decay}
        clip = 0.0 if CONFIG.max_grad_norm is None else CONFIG.max_grad_norm
        stepped = _execute(parts, _step(number, 4, learning_rate=CONFIG.lr, max_grad_norm=clip, **configured))
        assert isinstance(stepped, commands.StepDone), stepped
        assert isinstance(reply, commands.StepDone)
        moved = {name: float((tensor - start[name]).norm()) for name, (_, tensor) in expected.items()}
        differences.append(
            {
                name: float((got[name][1] - tensor).norm()) / (moved[name] + 1e-12)
                for name, (_, tensor) in expected.items()
            }
            | {"loss": abs(stepped.figures.loss - reply.figures.loss)}
            | {"norm": abs(stepped.figures.grad_norm / reply.figures.grad_norm - 1)}
        )
        assert stepped.figures.num_tokens == reply.figures.num_tokens + 2 * sum(len(s.token_ids) for s in batch[:3])
        assert stepped.figures.weight_version == reply.figures.weight_version == number
        assert parts.trainer.optimizer.config == replace(OTHER, lr=CONFIG.lr), "the options outlived their step"
    return differences


@pytest.mark.parametrize(("num_replicas", "tp_size"), [(1, 1), (1, 2), (2, 1)])
def test_a_step_in_parts_is_the_step(num_replicas: int, tp_size: int, checkpoints: Path) -> None:
    """Share of the displacement; a projected gradient that nearly vanishes turns rounding into direction, hence 1e-3."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    for rank, found in enumerate(run_ranks(_both_ways, num_replicas * tp_size, tp_size, checkpoint)):
        for differences in found:
            wrong = {name: value for name, value in differences.items() if not value < 1e-3}
            assert not wrong, f"rank {rank}: {wrong}"


def test_options_are_of_one_step(checkpoints: Path) -> None:
    """Each of them changes what is written, as the configuration with it would."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    base = replace(CONFIG, max_grad_norm=0.1, schedule=Schedule.linear, total_steps=20, warmup_steps=3)
    for options, config in (
        ({"learning_rate": 3e-4}, replace(base, lr=3e-4, schedule=Schedule.constant, warmup_steps=0)),
        ({"betas": (0.5, 0.6)}, replace(base, betas=(0.5, 0.6))),
        ({"eps": 1e-2}, replace(base, eps=1e-2)),
        ({"weight_decay": 0.5}, replace(base, weight_decay=0.5)),
        ({"max_grad_norm": 0.0}, replace(base, max_grad_norm=None)),
    ):
        ends = []
        for configured, asked in ((config, {}), (base, options), (base, {})):
            loop, tensors = _loop(TPGroup.single(), 1, checkpoint, configured)
            for number in (1, 2):
                _execute(loop, commands.ForwardBackward(id="f", samples=_weighted(samples(seed=number), 0.01)))
                reply = _execute(loop, _step(number, 1, **asked))
                assert isinstance(reply, commands.StepDone), reply
            ends.append({name: tensor.clone() for name, (_, tensor) in tensors.items()})
        as_configured, as_asked, without = ends
        assert all(torch.equal(as_configured[name], tensor) for name, tensor in as_asked.items()), options
        assert not all(torch.equal(without[name], tensor) for name, tensor in as_asked.items()), options


def _dropped(world: TPGroup, checkpoint: Path, how: Callable[[RankLoop], None]) -> tuple[str, str, bool]:
    loop, tensors = _loop(world, world.size, checkpoint, CONFIG)
    _execute(loop, commands.ForwardBackward(id="f", samples=samples()))
    how(loop)
    before = {name: tensor.clone() for name, (_, tensor) in tensors.items()}
    reply = _execute(loop, _step(2, 1))
    assert isinstance(reply, commands.CommandFailed)
    same = all(torch.equal(before[name], tensor) for name, (_, tensor) in tensors.items())
    again = _execute(loop, commands.ForwardBackward(id="f", samples=samples()))
    assert isinstance(again, commands.ForwardBackwardDone), again
    return reply.error, reply.message, same and again.num_passes == 1


def _another_step(loop: RankLoop) -> None:
    _execute(loop, commands.Step(id="j/1", job_id="j", job_step=1, samples=samples()))


def _a_failure(loop: RankLoop) -> None:
    reply = _execute(loop, commands.ForwardBackward(id="f", samples=[Sample([1] * 65, [0.0] + [1.0] * 64)]))
    assert isinstance(reply, commands.CommandFailed)


def test_clipping_that_was_never_prepared_is_refused(checkpoints: Path) -> None:
    loop, _ = _loop(TPGroup.single(), 1, checkpoints / CASES[CASE].checkpoint, replace(CONFIG, max_grad_norm=None))
    _execute(loop, commands.ForwardBackward(id="f", samples=samples()))
    reply = _execute(loop, _step(1, 1, max_grad_norm=1.0))
    assert isinstance(reply, commands.CommandFailed)
    assert "started with optim.max_grad_norm=null" in reply.message


@pytest.mark.parametrize("how", [_another_step, _a_failure])
def test_gradients_that_are_gone_are_not_stepped_on(how: Callable[[RankLoop], None], checkpoints: Path) -> None:
    """Nothing is written, and the next passes begin anew."""
    for error, message, clean in [_dropped(TPGroup.single(), checkpoints / CASES[CASE].checkpoint, how)]:
        assert error == "RequestError"
        assert message.startswith("num_passes: got gradients of 0 passes, expected 1")
        assert clean


def test_a_step_knows_how_many_passes_it_is_of(checkpoints: Path) -> None:
    """A coordinator that lost count does not step on gradients of which it knows nothing; they are dropped."""
    loop, _ = _loop(TPGroup.single(), 1, checkpoints / CASES[CASE].checkpoint, CONFIG)
    for _ in range(2):
        _execute(loop, commands.ForwardBackward(id="f", samples=samples()))
    for number, got in ((1, 2), (2, 0)):
        reply = _execute(loop, _step(number, 1))
        assert isinstance(reply, commands.CommandFailed)
        assert f"got gradients of {got} passes, expected 1" in reply.message


def test_passes_of_other_losses_have_their_figures(checkpoints: Path) -> None:
    checkpoint = checkpoints / CASES[CASE].checkpoint
    loop, _ = _loop(TPGroup.single(), 1, checkpoint, CONFIG)
    batch = sampled_batch(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    loss = loss_of("ppo", normalisation="constant", divisor=100.0)
    done = _execute(loop, commands.ForwardBackward(id="f", samples=batch, loss=loss))
    assert isinstance(done, commands.ForwardBackwardDone)
    alone, _ = make_trainer(TPGroup.single(), checkpoint)
    step = alone.step(batch, loss=loss)
    assert done.loss == pytest.approx(step.loss, rel=1e-6)
    assert done.metrics == pytest.approx(step.metrics)
