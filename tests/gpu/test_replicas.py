"""Two GPUs that may round the same sum differently hold the same bits of replicated tensors after every step."""

from __future__ import annotations

import datetime
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import bind_model
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.optim import Optimizer
from apollo_tp.optim.replicas import checksums
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(300)]

CONFIG = {
    "vocab_size": 4096, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
"""Layers as wide as an 8B model's: kernels are chosen by width."""
STEPS, TOKENS = 60, 2048
SHORT = 64
"""Tokens of a sequence whose attention has one block: the gradients of longer ones are added up in any order."""


def _train(tp: TPGroup, by_timing: bool) -> tuple[int, int]:
    """Numbers of the norms' gradients that differ between the ranks before they agree, and all of them, over all steps.
    Raises ReplicaError after a step that leaves a weight with different bits."""
    torch.cuda.set_device(tp.rank)
    tp = TPGroup.world("nccl", datetime.timedelta(seconds=60))
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from profile_step import served_memory

    torch.manual_seed(0)
    config = Qwen3Config(**CONFIG)
    shards, side_by_side = served_memory(config, "cuda", tp)
    model = bind_model(
        config, shards, tp, fused_tensors=side_by_side, compiled=CompileOptions(deterministic_kernels=not by_timing)
    )
    optim = OptimConfig(lr=1e-4, max_relative_update=1.0, check_replicas_every=1)
    optimizer = Optimizer(optim, Precision.remainder, model.parameters, tp)
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(model, optimizer, tp, device=device, max_micro_batch_tokens=TOKENS)
    norms = [p for p in model.parameters if p.name.endswith(("layernorm.weight", "model.norm.weight"))]
    finish, differing, total = model.finish_gradients, 0, 0

    def count(*, compare: bool) -> torch.Tensor | None:
        nonlocal differing, total
        own = torch.cat([p.grad.float() for p in norms if p.grad is not None])
        a, b = tp.all_gather(own).view(2, -1)
        differing, total = differing + int((a != b).sum()), total + own.numel()
        return finish(compare=compare)

    model.finish_gradients = count  # type: ignore[method-assign]
    draw = random.Random(0)
    for _ in range(STEPS):
        tokens = draw.choices(range(config.vocab_size), k=TOKENS)
        outcome = trainer.step([Sample(tokens, [0.0] + [1.0] * (TOKENS - 1))])
        assert not outcome.skipped
    return differing, total


@pytest.mark.parametrize("by_timing", [False, True], ids=["by_rule", "by_timing"])
def test_replicas_stay_equal_whatever_the_compiler_chose_on_each_gpu(by_timing: bool) -> None:
    """As the trainer has it, both GPUs even compute the same bits. Where the compiler times kernels, they need not."""
    found = run_ranks(_train, 2, by_timing, deadline_seconds=250)
    print(f"{found[0][0]} of {found[0][1]} numbers of norms' gradients differed between the GPUs before they agreed")
    assert found[0] == found[1]
    assert found[0][1] > 0
    assert by_timing or found[0][0] == 0


def _train_late(world: TPGroup, late: bool) -> tuple[list[float], list[list[int]]]:
    """Losses, and checksums of the weights at the end, of two replicas of which one is slow to copy weights."""
    torch.cuda.set_device(world.rank)
    world = TPGroup.world("nccl", datetime.timedelta(seconds=60))
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from profile_step import served_memory

    mesh = Mesh.build(world, 1)
    torch.manual_seed(0)
    config = Qwen3Config(**CONFIG)
    shards, side_by_side = served_memory(config, "cuda", mesh.tp)
    model = bind_model(config, shards, mesh.tp, fused_tensors=side_by_side, compiled=CompileOptions())
    optim = OptimConfig(lr=1e-4, max_relative_update=1.0)
    optimizer = Optimizer(optim, Precision.remainder, model.parameters, mesh.tp, mesh.replicas)
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(model, optimizer, mesh.tp, mesh=mesh, device=device, max_micro_batch_tokens=TOKENS)
    if late:
        trainer.publish_late()
        publish = optimizer.owners.publish

        def slowly(numbers: list[int] | None = None) -> None:
            torch.cuda._sleep(20_000_000)  # some milliseconds for each bucket: no layer finds its weights by chance
            publish(numbers)

        optimizer.owners.publish = slowly
    draw, losses = random.Random(0), []
    for _ in range(8):
        tokens = [draw.choices(range(config.vocab_size), k=SHORT) for _ in range(2 * TOKENS // SHORT)]
        samples = [Sample(each, [0.0] + [1.0] * (SHORT - 1)) for each in tokens]
        losses.append(trainer.step(samples).loss)
    optimizer.await_weights()
    optimizer.owners.check_equal()
    return losses, [checksums([p.tensor.data]).tolist() for p in model.parameters]


def test_weights_that_arrive_beside_the_next_pass_are_waited_for() -> None:
    early, again, late = (run_ranks(_train_late, 2, late, deadline_seconds=95) for late in (False, False, True))
    assert early[0][1] == early[1][1]
    assert again == early, "two runs without it differ already: the comparison says nothing"
    assert late[0][1] == late[1][1]
    assert late == early
