"""Checkpoints of several ranks: the served bits, second copies of trained tensors, a slow disk, what else a folder holds."""

from __future__ import annotations

import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from apollo_tp.checkpoint import folder as folders
from apollo_tp.checkpoint import latest, optimizer_state, read_info, writer
from apollo_tp.checkpoint.card import public_name
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CheckpointError, RankFailedError
from apollo_tp.inspect.exactness import local_part, map_copy, reference_logprobs, samples
from apollo_tp.model.towers import auto_class
from tests.support.families import CASES, store_head
from tests.support.ranks import run_ranks
from tests.support.trainers import CASE, make_trainer


def _writer(
    tp: TPGroup, checkpoint: Path, root: Path, tensors: dict, served: Path | None = None, mesh: Mesh | None = None
) -> CheckpointWriter:
    mapped, path = replace(map_copy(checkpoint, tp), tensors=tensors), str(served or checkpoint)
    content = mapped.manifest.checkpoint
    return CheckpointWriter(
        root, path, content, mapped.stored, mesh or Mesh.single(tp), keep=2, save_config=lambda folder: None
    )


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
    beside = ["second.optimizer", "third.optimizer"]
    assert sorted(p.name for p in root.iterdir()) == ["latest", "second", beside[0], "third", beside[1]]
    assert all((root / name / "optimizer.json").is_file() for name in beside)
    assert not any(path.is_dir() for path in (root / "third").iterdir())
    newest = latest(root)
    assert newest == (root / "third").resolve()
    info = read_info(newest)
    assert info is not None
    assert (info.weight_version, info.num_ranks) == (1, size)
    assert info.origin == public_name(str(checkpoints / CASES[CASE].checkpoint))
    assert str(checkpoints) not in (newest / "apollo_tp.json").read_text() + (newest / "README.md").read_text()


def _save_with_towers(tp: TPGroup, checkpoint: Path, root: Path) -> dict[str, list[str]]:
    """What loading the checkpoint of one step in transformers' full class lacks or has too much, and the names of parameters
    by whether they have changed."""
    trainer, tensors = make_trainer(tp, checkpoint)
    trainer.step(samples())
    path, _ = _writer(tp, checkpoint, root, tensors).save("first", trainer.optimizer, trainer.weight_version)
    model_class = auto_class(AutoConfig.from_pretrained(checkpoint))
    after, told = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    before = model_class.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    changed: dict[bool, list[str]] = {True: [], False: []}
    for name, tensor in after.state_dict().items():
        changed[not torch.equal(tensor, before[name])].append(name)
    return {"class": [type(after).__name__], "lost": sorted(told["missing_keys"] | told["unexpected_keys"])} | {
        "changed": changed[True], "same": changed[False],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "full_class"),
    [
        ("gemma3-vision", "Gemma3ForConditionalGeneration"),
        ("qwen3.5-vision", "Qwen3_5ForConditionalGeneration"),
        ("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3-vl", "Qwen3VLForConditionalGeneration"),
        ("mistral3", "Mistral3ForConditionalGeneration"),
        ("glm4v", "Glm4vForConditionalGeneration"),
    ],
)
def test_a_model_that_sees_images_keeps_its_towers(
    family: str, full_class: str, checkpoints: Path, tmp_path: Path
) -> None:
    """Its checkpoint is a full model in transformers: the language model is trained, and nothing else has changed."""
    (found, _) = run_ranks(_save_with_towers, 2, checkpoints / family, tmp_path)
    assert (found["class"], found["lost"]) == ([full_class], [])
    assert found["changed"]
    assert found["same"]
    assert all("language_model" in name or name == "lm_head.weight" for name in found["changed"])
    assert not any("language_model" in name for name in found["same"])


def _save_replicas(world: TPGroup, checkpoint: Path, root: Path) -> bool:
    mesh = Mesh.build(world, 2)
    trainer, tensors = make_trainer(mesh.tp, checkpoint, mesh=mesh)
    trainer.step(samples())
    path, num_bytes = _writer(mesh.tp, checkpoint, root, tensors, mesh=mesh).save("first", trainer.optimizer, 1)
    state = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert num_bytes > 0
    return all(torch.equal(local_part(state[name], shard), local) for name, (shard, local) in tensors.items())


def test_replicas_write_one_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    """Two replicas of two ranks: the weights once, the state of both; any number of ranks can go on with it."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    assert all(run_ranks(_save_replicas, 4, checkpoint, tmp_path))
    info = read_info(tmp_path / "first")
    assert info is not None
    assert info.num_ranks == 4
    shutil.copytree(checkpoint / "tp1", tmp_path / "first" / "tp1")
    trainer, _ = make_trainer(TPGroup.single(), tmp_path / "first")
    optimizer_state.load(trainer.optimizer, folders.optimizer_folder(tmp_path / "first"))
    assert trainer.optimizer.step_count == 1


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
    optimizer_state.load(again.optimizer, folders.optimizer_folder(written))
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
    kept = [name for name in ("c1", "c3", "c4") for name in (name, f"{name}.optimizer")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "latest"]
