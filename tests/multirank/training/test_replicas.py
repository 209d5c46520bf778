"""A trainer over several replicas against one process: R x P of 2 x 1, 4 x 1, 2 x 2 and 1 x 4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_tp.config import GradientMode, OptimConfig
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.inspect.exactness import local_part, reference_gradients, relative_error, samples
from apollo_tp.model.batch import divide
from apollo_tp.optim.late_weights import LateWeights
from apollo_tp.optim.owners import Owners
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire import commands
from apollo_tp.wire.commands import Sample
from tests.support.families import CASES
from tests.support.rank_loops import DEADLINE, in_forward, once
from tests.support.rank_services import RecordingServices
from tests.support.ranks import run_ranks, start_origins
from tests.support.reference_optimizer import ReferenceOptimizer
from tests.support.trainers import CASE, CONFIG, make_trainer, preference_pairs

STEPS = 5
SHAPES = [(2, 1), (4, 1), (2, 2), (1, 4)]
CLIPPED = replace(CONFIG, max_grad_norm=0.5)
Twin = tuple[dict[str, torch.Tensor], list[float], list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module", autouse=True)
def origins() -> None:
    """Four ranks import at once: a rank waits a minute for the others, no longer."""
    start_origins(4)


def _twin(checkpoint: Path, config: OptimConfig) -> Twin:
    """Weights, losses and gradients of the single-process Hugging Face model under the plain optimizer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    weights = {name: p.data for name, p in model.named_parameters()}
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    roles = {n: "embedding" if n in vocabulary else "matrix" if w.ndim == 2 else "other" for n, w in weights.items()}
    optimizer = ReferenceOptimizer(config, weights, roles)
    losses, all_gradients = [], []
    for step in range(STEPS):
        loss, gradients = reference_gradients(model, samples(seed=step))
        losses.append(loss)
        all_gradients.append({name: gradient.clone() for name, gradient in gradients.items()})
        assert optimizer.step(gradients) == ""
    return weights, losses, all_gradients


def _bytes_of_a_step(trainer: Trainer) -> Counter[str]:
    """What this rank exchanges with the other replicas in a step, by the formulas."""
    size, owners = trainer.replicas.size, trainer.optimizer.owners
    if owners is None:
        return Counter()
    longest = [max(sum(owners.parameters[i].tensor.numel() for i in p) for p in b.indices) for b in owners.buckets]
    return Counter(
        reduce_scatter=sum(size * (elements + 1) * 4 for elements in longest),  # fp32 gradients, with a canary
        all_gather=sum(size * elements * 4 for elements in longest) + size * 6 * 8,  # weights; the replicas' decisions
        all_reduce=5 * 8
        + 4 * len(longest)
        + (2 * 4 if trainer.optimizer.config.max_grad_norm else 0),  # and norm, canary
    )


def _five_steps(world: TPGroup, tp_size: int, checkpoint: Path, config: OptimConfig) -> tuple[dict[str, float], dict]:
    """Errors against the twin, and the figures of the last step."""
    mesh = Mesh.build(world, tp_size)
    trainer, tensors = make_trainer(mesh.tp, checkpoint, config, mesh)
    start = {name: local.clone() for name, (_, local) in tensors.items()}
    expected, losses, gradients = _twin(checkpoint, config)
    errors: dict[str, float] = {}

    sum_gradients = owners.sum_gradients if (owners := trainer.optimizer.owners) is not None else None

    def compare_gradients() -> object:
        """Those of all replicas, which their owners have."""
        summed = sum_gradients() if sum_gradients is not None else ({}, torch.ones(1))
        for index, p in enumerate(trainer.model.parameters):
            whole = gradients[step][p.name]
            if owners is None or owners.owner[index] == mesh.replicas.rank:
                total = summed[0].get(index, p.grad if p.grad is not None else torch.zeros(p.tensor.shape))
                errors[f"gradient of {p.name} {step}"] = relative_error(total, local_part(whole, p.shard), whole)
        return summed

    if owners is None:
        trainer._before_write = compare_gradients
    else:
        owners.sum_gradients = compare_gradients
    for step in range(STEPS):
        result = trainer.step(samples(seed=step))
        assert result.skipped == ""
        assert result.num_tokens == sum(len(s.token_ids) for s in samples(seed=step))
        errors[f"loss {step}"] = abs(result.loss - losses[step]) / abs(losses[step])
        norm = sum(float(g.double().square().sum()) for g in gradients[step].values()) ** 0.5
        errors[f"norm {step}"] = abs(result.grad_norm - norm) / norm
        if trainer.optimizer.owners is not None:
            trainer.optimizer.owners.check_equal()
    for name, (shard, local) in tensors.items():
        part = local_part(expected[name], shard)
        errors[name] = float((local - part).norm() / (part - start[name]).norm()) if part.numel() else 0.0
    trainer._before_write = lambda: None
    if owners is not None:
        owners.sum_gradients = sum_gradients
    mesh.replicas.traffic.clear()
    trainer.step(samples(seed=STEPS))
    assert mesh.replicas.traffic == _bytes_of_a_step(trainer)
    whole = {name: local.numpy() for name, (_, local) in tensors.items()}
    return errors, whole


@pytest.mark.parametrize("config", [CONFIG, CLIPPED], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(("num_replicas", "tp_size"), SHAPES)
def test_five_steps_equal_the_single_process_run(num_replicas, tp_size, config, checkpoints: Path) -> None:
    """Losses, gradients, norms and weights (tolerances as in test_trainer); replicas have equal bits after every step; the
    bytes on the wire are those of the formulas."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    results = run_ranks(_five_steps, num_replicas * tp_size, tp_size, checkpoint, config, deadline_seconds=240)
    for rank, (errors, whole) in enumerate(results):
        wrong = {name: error for name, error in errors.items() if not error < (1e-5 if "loss 0" in name else 1e-3)}
        assert not wrong, f"rank {rank}: {wrong}"
        of_first = results[rank % tp_size][1]
        assert all((of_first[name] == value).all() for name, value in whole.items())


class _AsLateAsPossible(LateWeights):
    """In place of a stream: a bucket is copied when somebody waits for it. Fails if nobody waits long enough."""

    def launch(self) -> None:
        if not self._is_due:
            return
        self._is_due = False
        self._events, self._copied = [None] * len(self._order), 0
        assert len(self._order) > 4

    def _await(self, count: int) -> None:
        self._owners.publish(self._order[self._copied : count])
        self._copied = max(self._copied, count)


def _late_steps(world: TPGroup, tp_size: int, checkpoint: Path, late: bool) -> tuple[list, dict, list[int]]:
    """Losses, the last weights, and how many of the owners' buckets had been copied when a forward pass was over."""
    mesh, copied = Mesh.build(world, tp_size), []
    trainer, tensors = make_trainer(mesh.tp, checkpoint, replace(CONFIG, check_replicas_every=2), mesh)
    optimizer = trainer.optimizer
    if late:
        owners = Owners(optimizer.owners.parameters, optimizer.owners.owner, mesh.replicas, bucket_bytes=4096)
        optimizer.late_weights = _AsLateAsPossible(owners, *trainer.model.reading_order())
        for layer in trainer.model.reading_order()[1]:
            layer.register_forward_pre_hook(lambda *_: copied.append(getattr(optimizer.late_weights, "_copied", 0)))
    losses = [trainer.step(samples(seed=step)).loss for step in range(STEPS)]
    losses += list(trainer.score(samples()[:2]).logprobs)
    optimizer.await_weights()
    optimizer.owners.check_equal()
    return losses, {name: local.numpy() for name, (_, local) in tensors.items()}, copied


@pytest.mark.parametrize(("num_replicas", "tp_size"), [(2, 1), (2, 2)])
def test_each_layer_waits_for_its_weights(num_replicas: int, tp_size: int, checkpoints: Path) -> None:
    """Weights that arrive beside the next forward pass, at the last moment: the same bits as those that arrive before."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    runs = [run_ranks(_late_steps, num_replicas * tp_size, tp_size, checkpoint, late) for late in (False, True)]
    for (losses, whole, _), (late_losses, late_whole, copied) in zip(*runs, strict=True):
        assert late_losses == losses
        assert all((late_whole[name] == value).all() for name, value in whole.items())
        assert len(set(copied)) > 2, "some arrive while the layers run"


def _uneven(world: TPGroup, checkpoint: Path) -> list:
    """Figures of a step on one sample, of which one replica has none; of a preference step; of a bad sample; then good."""
    mesh = Mesh.build(world, 1)
    trainer, _ = make_trainer(mesh.tp, checkpoint, mesh=mesh)
    one = trainer.step(samples()[:1])
    dpo = trainer.preference_step(preference_pairs(), 0.3)
    with pytest.raises(RequestError, match="expected 1 to 64"):
        trainer.step([Sample([1] * 65, [0.0] + [1.0] * 64), *samples()])
    rest = trainer.step(samples())
    if trainer.optimizer.owners is not None:
        trainer.optimizer.owners.check_equal()
    names = ("loss", "num_tokens", "num_loss_tokens", "token_accuracy", "grad_norm", "metrics", "weight_version")
    return [{name: getattr(figures, name) for name in names} for figures in (one, dpo, rest)]


def test_figures_are_of_all_replicas(checkpoints: Path) -> None:
    """Fewer samples than replicas, preference pairs, and samples that are refused on every replica alike."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    (alone,) = run_ranks(_uneven, 1, checkpoint)
    for found in run_ranks(_uneven, 2, checkpoint):
        for got, expected in zip(found, alone, strict=True):
            assert got.pop("metrics") == pytest.approx(expected["metrics"], rel=1e-3)
            assert got == pytest.approx({k: v for k, v in expected.items() if k != "metrics"}, rel=1e-3)


def test_samples_are_divided_by_tokens() -> None:
    """No replica has more than the longest sample above another."""
    lengths = [37, 5, 20, 29, 2, 41, 11, 1, 1, 60]
    for parts in (1, 2, 3, 4, 12):
        divided = divide(lengths, parts)
        sums = [sum(lengths[i] for i in part) for part in divided]
        assert sorted(i for part in divided for i in part) == list(range(len(lengths)))
        assert max(sums) - min(sums) <= max(lengths)


def _refuse(world: TPGroup, checkpoint: Path) -> str:
    mesh = Mesh.build(world, 1)
    trainer, _ = make_trainer(mesh.tp, checkpoint, replace(CONFIG, max_grad_norm=None), mesh)
    options = {"mesh": mesh, "device": torch.device("cpu"), "max_micro_batch_tokens": 64}
    assert Trainer(trainer.model, trainer.optimizer, mesh.tp, **options).gradients is GradientMode.stored
    with pytest.raises(ConfigError) as error:
        Trainer(trainer.model, trainer.optimizer, mesh.tp, gradients=GradientMode.in_backward, **options)
    return str(error.value)


def test_updates_in_the_backward_pass_are_refused(checkpoints: Path) -> None:
    for message in run_ranks(_refuse, 2, checkpoints / CASES[CASE].checkpoint):
        assert message.startswith("train.gradients: got in_backward with 2 replicas, expected stored")


def _fail(world: TPGroup, checkpoint: Path, where: str) -> list:
    """One replica raises in its forward pass, or while it copies the owners' weights; then two good steps."""
    world.form("gloo", DEADLINE)
    mesh = Mesh.build(world, 2)
    trainer, tensors = make_trainer(mesh.tp, checkpoint, replace(CONFIG, check_replicas_every=1), mesh)
    services = RecordingServices(form_group=lambda: world.form("gloo", DEADLINE))
    loop = RankLoop(trainer, services, Control(world.rank, world.size), None)

    def step(number: int) -> commands.AnyReply:
        return loop.execute(commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=samples(seed=number)))

    def out_of_room(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    assert isinstance(step(1), commands.StepDone)
    if world.rank == 3 and where == "forward":
        in_forward(trainer)
    elif world.rank == 3:
        once(trainer.optimizer.owners, "publish", out_of_room)
    reply = step(2)
    assert isinstance(reply, commands.CommandFailed)

    def checked(forward: Callable[..., object], batch: object) -> object:
        trainer.optimizer.owners.check_equal()
        return forward(batch)

    once(trainer.model, "forward_loss", checked)
    done = step(3)
    assert isinstance(done, commands.StepDone), done
    return [reply.rank, reply.error, {name: local.numpy() for name, (_, local) in tensors.items()}]


@pytest.mark.parametrize("where", ["forward", "publish"])
def test_a_rank_that_fails_leaves_replicas_equal(where: str, checkpoints: Path) -> None:
    """It is named on all ranks; the next step computes with equal weights, and leaves such, bit for bit."""
    results = run_ranks(_fail, 4, checkpoints / CASES[CASE].checkpoint, where)
    for rank, (failed, error, tensors) in enumerate(results):
        assert (failed, error) == (3, "OutOfMemoryError")
        assert all((results[rank % 2][2][name] == value).all() for name, value in tensors.items())
