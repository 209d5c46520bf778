"""The trainer over several ranks: the same weights as a plain single-process run, and a rank that fails does no harm."""

from __future__ import annotations

import datetime
import gc
import resource
import shutil
import threading
import traceback
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from apollo_tp.checkpoint import CheckpointWriter, latest, optimizer_state, read_info, writer
from apollo_tp.checkpoint import folder as folders
from apollo_tp.config import OptimConfig, OptimizerKind, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CheckpointError, RankFailedError, ReplicaError
from apollo_tp.model import bind_model
from apollo_tp.optim import build_optimizer
from apollo_tp.optim.reference import ReferenceOptimizer
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import PreferencePair, Sample
from tests.support.exactness import local_part, reference_gradients, reference_logprobs, samples
from tests.support.families import CASES, store_head
from tests.support.ranks import run_ranks
from tests.support.served import map_case

STEPS = 5
CASE = "qwen3"
CONFIG = OptimConfig(rank=8, lr=1e-3, max_relative_update=1.0)


def make_trainer(tp: TPGroup, checkpoint: Path, config: OptimConfig = CONFIG) -> tuple[Trainer, dict]:
    """A trainer over memory of this process, and the mapped tensors by name."""
    mapped = map_case(checkpoint, tp)
    model = bind_model(AutoConfig.from_pretrained(checkpoint), mapped.tensors, tp, fused_tensors=mapped.fused_tensors)
    optimizer = build_optimizer(config, Precision.remainder, model.parameters, tp)
    trainer = Trainer(model, optimizer, tp, device=torch.device("cpu"), max_micro_batch_tokens=64)
    return trainer, mapped.tensors


def twin_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of the single-process Hugging Face model under the plain optimizer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    weights = {name: p.data for name, p in model.named_parameters()}
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    roles = {
        name: "embedding" if name in vocabulary else "matrix" if weight.ndim == 2 else "other"
        for name, weight in weights.items()
    }
    optimizer = ReferenceOptimizer(CONFIG, weights, roles)
    losses = []
    for step in range(STEPS):
        loss, gradients = reference_gradients(model, samples(seed=step))
        losses.append(loss)
        assert optimizer.step(gradients) == ""
    return weights, losses


def _five_steps(tp: TPGroup, checkpoint: Path) -> dict[str, float]:
    trainer, tensors = make_trainer(tp, checkpoint)
    start = {name: local.clone() for name, (_, local) in tensors.items()}
    expected, losses = twin_weights(checkpoint)
    errors = {}
    for step in range(STEPS):
        result = trainer.step(samples(seed=step))
        assert result.skipped == ""
        assert result.num_micro_batches >= 3
        phases = (result.forward_seconds, result.backward_seconds, result.optimizer_seconds)
        assert min(phases) > 0
        assert sum(phases) <= result.step_seconds
        errors[f"loss {step}"] = abs(result.loss - losses[step]) / abs(losses[step])
    assert trainer.weight_version == STEPS
    for name, (shard, local) in tensors.items():
        part = local_part(expected[name], shard)
        errors[name] = float((local - part).norm() / (part - start[name]).norm()) if part.numel() else 0.0
    return errors


@pytest.mark.parametrize("size", [1, 2, 4])
def test_five_steps_equal_the_single_process_run(size: int, checkpoints: Path) -> None:
    """Share of the displacement, fp32. A projected gradient that nearly vanishes turns rounding into direction, hence 1e-3;
    sharding by guess (per local shard) is off by 0.5 and more."""
    for rank, errors in enumerate(run_ranks(_five_steps, size, checkpoints / CASES[CASE].checkpoint)):
        wrong = {name: error for name, error in errors.items() if not error < (1e-5 if "loss 0" in name else 1e-3)}
        assert not wrong, f"rank {rank}: {wrong}"


NORM_CASES = ("phi3", "fused rows replicated in part", "one KV head")


def _first_outcomes(tp: TPGroup, folder: Path) -> dict[str, tuple[float, float]]:
    """Per case and optimizer: global gradient norm, and the largest relative update, of two steps."""
    found = {}
    for name in NORM_CASES:
        for kind in (OptimizerKind.apollo, OptimizerKind.adamw):
            trainer, _ = make_trainer(tp, folder / CASES[name].checkpoint, replace(CONFIG, kind=kind))
            for step in range(2):
                outcome = trainer.step(samples(seed=step))
                assert outcome.skipped == ""
                found[f"{name}, {kind.value}, {step}"] = (outcome.grad_norm, outcome.largest_update)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_norms_count_what_several_ranks_hold_once(size: int, checkpoints: Path) -> None:
    """KV heads of their own tensor, and key and value rows inside a fused one: norms are those of one rank."""
    (expected,) = run_ranks(_first_outcomes, 1, checkpoints)
    for found in run_ranks(_first_outcomes, size, checkpoints):
        assert found.keys() == expected.keys()
        wrong = {
            name: (found[name], alone)
            for name, alone in expected.items()
            if found[name] != pytest.approx(alone, rel=1e-4)
        }
        assert not wrong


def _round_otherwise(tp: TPGroup, checkpoint: Path, error: float) -> dict[str, torch.Tensor]:
    """Norm weights after three steps in which the other ranks' gradients of them are off by a factor 1 + ``error``."""
    trainer, tensors = make_trainer(tp, checkpoint, replace(CONFIG, check_replicas_every=1))
    norms = [p for p in trainer.model.parameters if p.name.endswith(("layernorm.weight", "model.norm.weight"))]
    assert all(p.shard.dim is None for p in norms)
    for parameter in norms if tp.rank else []:
        parameter.leaf.register_hook(lambda gradient: gradient * (1 + error))
    for step in range(3):
        assert trainer.step(samples(seed=step)).skipped == ""
    return {p.name: tensors[p.name][1].clone() for p in norms}


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_stay_equal_where_ranks_round_differently(size: int, checkpoints: Path) -> None:
    """What a compiler's choice of kernels, made on each GPU by itself, does to the gradients of norms: all take rank 0's."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    expected = run_ranks(_round_otherwise, size, checkpoint, 0.0)[0]
    for found in run_ranks(_round_otherwise, size, checkpoint, 1e-3):
        assert len(found) == len(expected) > 4
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def _lack_a_sum(tp: TPGroup, checkpoint: Path, every: int) -> tuple[str, str, bool]:
    """Error of each of two steps in which the last rank's gradient of one norm is half of what it should be, and whether
    a weight changed."""
    trainer, tensors = make_trainer(tp, checkpoint, replace(CONFIG, check_replicas_every=every))
    before = {name: local.clone() for name, (_, local) in tensors.items()}
    norm = next(p for p in trainer.model.parameters if p.name.endswith("1.input_layernorm.weight"))
    if tp.rank == tp.size - 1:
        norm.leaf.register_hook(lambda gradient: gradient * 0.5)
    errors = ["", ""]
    for step in range(2):
        try:
            trainer.step(samples())
        except ReplicaError as caught:
            errors[step] = str(caught)
            trainer.abandon_step()
    return *errors, any(not torch.equal(tensors[name][1], value) for name, value in before.items())


@pytest.mark.parametrize("size", [2, 4])
def test_a_gradient_that_lacks_a_sum_stops_steps_before_they_write(size: int, checkpoints: Path) -> None:
    """On all ranks alike, by name; where replicas are not checked at all it goes unseen."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    found = run_ranks(_lack_a_sum, size, checkpoint, 50)
    assert len(set(found)) == 1
    error, again, changed = found[0]
    assert error == again
    assert "model.layers.1.input_layernorm.weight by " in error
    assert "a sum over ranks is missing" in error
    assert not changed
    assert run_ranks(_lack_a_sum, size, checkpoint, 0) == [("", "", True)] * size


def _pairs() -> list[PreferencePair]:
    batch = samples(lengths=(20, 11, 17, 9, 23, 14))
    return [PreferencePair(batch[i], batch[i + 1], -10.0 - i, -12.0 + i) for i in (0, 2, 4)]


def _preference(tp: TPGroup, checkpoint: Path) -> tuple[float, float, list[float]]:
    trainer, _ = make_trainer(tp, checkpoint)
    sides = [side for pair in _pairs() for side in (pair.preferred, pair.rejected)]
    scores = trainer.score(sides).logprobs
    result = trainer.preference_step(_pairs(), beta=0.3)
    return result.loss, result.metrics["reward_margin"], scores


@pytest.mark.parametrize("size", [1, 2])
def test_preference_loss_equals_an_independent_implementation(size: int, checkpoints: Path) -> None:
    """DPO from single-process log-probabilities, written out here."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")

    def summed(sample: Sample) -> float:
        with torch.no_grad():
            (logprobs,) = reference_logprobs(model, [sample])
        return float((torch.tensor(sample.weights[1:]) * logprobs).sum())

    margins = [
        0.3 * ((summed(p.preferred) - p.reference_preferred) - (summed(p.rejected) - p.reference_rejected))
        for p in _pairs()
    ]
    expected = sum(float(torch.log1p(torch.exp(torch.tensor(-m)))) for m in margins) / len(margins)
    for loss, margin, scores in run_ranks(_preference, size, checkpoint):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert margin == pytest.approx(sum(margins) / len(margins), rel=1e-4)
        assert scores == pytest.approx([summed(s) for p in _pairs() for s in (p.preferred, p.rejected)], rel=1e-4)


def _lose_and_join_again(tp: TPGroup, checkpoint: Path) -> list[float]:
    own = TPGroup.world("gloo", datetime.timedelta(seconds=30))
    trainer, _ = make_trainer(own, checkpoint)
    losses = [trainer.step(samples()).loss]
    failed = ""
    try:
        if tp.rank == 1:
            raise ValueError("injected")
        trainer.step(samples())
    except (ValueError, RuntimeError) as error:
        failed = type(error).__name__
        error.__traceback__ = None
    assert failed == ("ValueError" if tp.rank == 1 else "RuntimeError")
    gc.collect()
    own.dissolve()
    dist.barrier()
    own.form("gloo", datetime.timedelta(seconds=30))
    trainer.model.zero_grad()
    losses.append(trainer.step(samples()).loss)
    return losses


def test_ranks_join_again_after_one_failed(checkpoints: Path) -> None:
    """Ranks inside a collective are woken at once when another leaves the group, and the next step is right."""
    results = run_ranks(_lose_and_join_again, 4, checkpoints / CASES[CASE].checkpoint, deadline_seconds=60)
    assert all(result == results[0] for result in results)
    assert results[0][1] < results[0][0]


class _ShortOfMemory(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")


def test_a_step_that_raises_inside_a_layer_keeps_nothing_of_it_alive(checkpoints: Path) -> None:
    """Between the parts of a joined product (gate and up): what autograd saved would leave no room for the next step."""
    trainer, _ = make_trainer(TPGroup.single(), checkpoints / CASES[CASE].checkpoint)
    first, *_, last = trainer.model.module.base_model.layers
    found = []
    first.register_forward_hook(lambda module, arguments, output: found.append(weakref.ref(output)))
    sound, last.mlp.act_fn = last.mlp.act_fn, _ShortOfMemory()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.step(samples())
    traceback.clear_frames(caught.value.__traceback__)
    del caught
    trainer.abandon_step()
    gc.collect()
    assert [activation() for activation in found] == [None]
    last.mlp.act_fn = sound
    assert trainer.step(samples()).skipped == ""


def _form_parts(tp: TPGroup) -> None:
    FakeStore()  # its import makes "fake" known
    for backend in ("fake", "gloo"):
        own = TPGroup(tp.rank, tp.size)
        for _ in range(2):
            own.form(backend, datetime.timedelta(seconds=7))
            part = own.subgroup((0, 1))
            if tp.rank < 2:
                assert dist.get_backend(part.group) == backend
            if tp.rank < 2 and backend == "gloo":  # the other one has no options
                options = part.group._get_backend(torch.device("cpu")).options  # type: ignore[union-attr]
                assert options._timeout == datetime.timedelta(seconds=7)
            dist.barrier()
            own.dissolve()
            dist.barrier()


def test_parts_of_a_group_have_its_backend_and_deadline() -> None:
    """Not those of the default group (gloo), neither when they are made nor when they join again."""
    run_ranks(_form_parts, 3)


def _writer(tp: TPGroup, checkpoint: Path, root: Path, tensors: dict, served: Path | None = None) -> CheckpointWriter:
    mapped, path = replace(map_case(checkpoint, tp), tensors=tensors), str(served or checkpoint)
    content = mapped.manifest.checkpoint
    return CheckpointWriter(root, path, content, mapped.stored, tp, keep=2, save_config=lambda folder: None)


def _save(tp: TPGroup, checkpoint: Path, root: Path) -> bool:
    trainer, tensors = make_trainer(tp, checkpoint)
    trainer.step(samples())
    writer = _writer(tp, checkpoint, root, tensors)
    for name in ("first", "second", "third"):
        path, _ = writer.save(name, trainer.optimizer, trainer.weight_version)
    state = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    error = CheckpointError if tp.rank == 0 else RankFailedError
    with pytest.raises(error, match="taken"):
        writer.save("third", trainer.optimizer, trainer.weight_version)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # in place of a full disk, where writing to a file's map would be SIGBUS
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    with pytest.raises(error, match="large"):
        writer.save("fourth", trainer.optimizer, trainer.weight_version)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return all(torch.equal(local_part(state[name], shard), local) for name, (shard, local) in tensors.items())


@pytest.mark.parametrize("size", [1, 4])
def test_checkpoint_holds_the_served_bits(size: int, checkpoints: Path, tmp_path: Path) -> None:
    """Written in parts by all ranks, replicas once; private; complete, with `latest`, and old ones pruned. Of one for which
    there is no room nothing is left."""
    root = tmp_path / "checkpoints"
    assert all(run_ranks(_save, size, checkpoints / CASES[CASE].checkpoint, root))
    assert sorted(p.name for p in root.iterdir()) == ["latest", "second", "third"]
    newest = latest(root)
    assert newest == (root / "third").resolve()
    info = read_info(newest)
    assert info is not None
    assert (info.weight_version, info.num_ranks) == (1, size)
    assert info.origin == str(checkpoints / CASES[CASE].checkpoint)


def _train_and_go_on(tp: TPGroup, checkpoint: Path, root: Path) -> list[list[float]]:
    """Log-probabilities of the samples: after two steps, in transformers on the folder written then, and of a trainer over
    that folder, with the optimizer's state; after the third step of both."""
    trainer, tensors = make_trainer(tp, checkpoint)
    for step in range(2):
        assert trainer.step(samples(seed=step)).skipped == ""
    found = [trainer.score(samples()).logprobs]
    written, _ = _writer(tp, checkpoint, root, tensors).save("first", trainer.optimizer, trainer.weight_version)
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        each = reference_logprobs(model, samples())
    found.append(
        [float((torch.tensor(s.weights[1:]) * tokens).sum()) for s, tokens in zip(samples(), each, strict=True)]
    )
    if tp.rank == 0:
        shutil.copytree(checkpoint / f"tp{tp.size}", written / f"tp{tp.size}")
    tp.all_reduce_(torch.zeros(1))
    again, _ = make_trainer(tp, written)
    optimizer_state.load(again.optimizer, written / folders.OPTIMIZER_DIR)
    found.append(again.score(samples()).logprobs)
    for each_trainer in (trainer, again):
        each_trainer.step(samples(seed=2))
        found.append(each_trainer.score(samples()).logprobs)
    return found


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("head", ["equal", "other", "ignored"])
def test_a_stored_head_follows_what_is_served(head: str, size: int, checkpoints: Path, tmp_path: Path) -> None:
    """Of a model that its config ties: a head equal to the embedding; another one, which vLLM 0.32 serves as it is; another
    one that earlier releases pass over, so that the folder must not have it any more. It is the model that is served."""
    name = "tied by its config, another head stored" if head == "other" else "tied, its head stored as well"
    checkpoint = checkpoints / CASES[name].checkpoint
    if head == "ignored":  # what is served is that of the equal one
        checkpoint = shutil.copytree(checkpoint, tmp_path / "ignored")
        store_head(checkpoint, slice(None))
    before = load_file(checkpoint / "model.safetensors")
    assert torch.equal(before["lm_head.weight"], before["model.embed_tokens.weight"]) == (head == "equal")
    for found in run_ranks(_train_and_go_on, size, checkpoint, tmp_path / "checkpoints"):
        live, elsewhere, again, third, third_again = found
        assert elsewhere == pytest.approx(live, rel=1e-4)
        assert again == live
        assert third_again == third != live
    after = load_file(tmp_path / "checkpoints" / "first" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"]) == (head != "other")
    assert not any(torch.equal(after[key], before[key]) for key in ("lm_head.weight", "model.embed_tokens.weight"))


def _save_on_a_slow_disk(tp: TPGroup, checkpoint: Path, root: Path) -> tuple[bool, bool]:
    """Whether the checkpoint is complete, and whether this rank flushed what it wrote. To rank 0 the disk is so slow that
    all ranks meet twice while it makes room, and twice while it flushes the whole."""
    trainer, tensors = make_trainer(tp, checkpoint)
    met, flushed, meet = threading.Semaphore(0), [], tp.all_reduce_
    writer.STILL_WORKING_SECONDS = 0.05

    def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
        result = meet(tensor)
        met.release()
        return result

    def slow(action):
        def run(*arguments):
            while met.acquire(blocking=False):  # those before do not count
                pass
            if not all(met.acquire(timeout=20) for _ in range(2)):
                raise OSError("the other ranks wait in a single collective")
            return action(*arguments)

        return run

    folders.begin, folders.fsync_tree = slow(folders.begin), slow(folders.fsync_tree)
    fsync, folders.fsync = folders.fsync, lambda path: (flushed.append((threading.current_thread(), path)), fsync(path))
    checkpoints = _writer(tp, checkpoint, root, tensors)
    tp.all_reduce_ = all_reduce_
    path, _ = checkpoints.save("first", trainer.optimizer, 1)
    own = {path.name for thread, path in flushed if thread is threading.main_thread()}
    return read_info(path) is not None, "model.safetensors" in own


def test_ranks_wait_for_rank_0_in_short_collectives(checkpoints: Path, tmp_path: Path) -> None:
    """A large model's copies and flushes take longer than one collective may: the others hear that rank 0 still works."""
    found = run_ranks(_save_on_a_slow_disk, 2, checkpoints / CASES[CASE].checkpoint, tmp_path / "checkpoints")
    assert found == [(True, True)] * 2


def test_a_checkpoint_has_all_chat_templates_and_no_old_weights(checkpoints: Path, tmp_path: Path) -> None:
    """Whatever form the source has its weights in besides."""
    source = shutil.copytree(checkpoints / CASES[CASE].checkpoint, tmp_path / "source")
    for name in (
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
        "model.onnx_data",
        "chat_template.jinja",
    ):
        (source / name).touch()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tp = TPGroup.single()
    trainer, tensors = make_trainer(tp, source)
    path, _ = _writer(tp, source, tmp_path / "root", tensors).save("first", trainer.optimizer, 1)
    assert (path / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert (path / "additional_chat_templates").stat().st_mode & 0o077 == 0
    top = {file.name for file in path.iterdir()}
    assert {"model.safetensors", "chat_template.jinja"} <= top
    assert not {file for file in top if Path(file).suffix in (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")}


def test_the_served_checkpoint_stays_where_the_server_was_told_latest(checkpoints: Path, tmp_path: Path) -> None:
    """The link moves on with each checkpoint."""
    tp, source = TPGroup.single(), checkpoints / CASES[CASE].checkpoint
    trainer, tensors = make_trainer(tp, source)
    _writer(tp, source, tmp_path, tensors).save("c1", trainer.optimizer, 1)
    served = _writer(tp, source, tmp_path, tensors, tmp_path / "latest")
    for name in ("c2", "c3", "c4"):
        served.save(name, trainer.optimizer, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c1", "c3", "c4", "latest"]
