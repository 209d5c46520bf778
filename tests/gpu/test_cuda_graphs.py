"""Replayed steps against steps that are not, on real GPUs: compiled layers, NCCL, sums through peer memory, real graphs."""

from __future__ import annotations

import datetime
import gc
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import bind_model
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.optim import Optimizer
from apollo_tp.training.cuda_graphs import GraphCache, capture
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CONFIG = {
    "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
ONE, FOUR, OTHER = (1024,), (1024,) * 4, (700, 300)
"""Lengths of a step's samples: one micro-batch, four that are alike, one of two sequences."""
BLOCK_BYTES = 64 * 2**20
"""A block that torch's allocators give back to the device by itself."""
STEPS = (ONE, ONE, ONE, FOUR, FOUR, FOUR, OTHER, OTHER, OTHER, ONE, ONE, ONE)


def _trainer(tp: TPGroup, *, in_fp8: bool = False) -> Trainer:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from profile_step import served_memory

    torch.manual_seed(0)
    config = Qwen3Config(**CONFIG)
    shards, side_by_side = served_memory(config, "cuda", tp)
    model = bind_model(config, shards, tp, fused_tensors=side_by_side, compiled=CompileOptions(), fp8=in_fp8)
    optim = OptimConfig(lr=1e-3, max_relative_update=1.0)
    optimizer = Optimizer(optim, Precision.stochastic, model.parameters, tp)
    device = torch.device("cuda", torch.cuda.current_device())
    return Trainer(model, optimizer, tp, device=device, max_micro_batch_tokens=1024)


def _samples(lengths: tuple[int, ...], seed: int) -> list[Sample]:
    """Text that can be learned: half the tokens say what comes next."""
    draw = random.Random(seed)
    rows = [[token for a in draw.choices(range(512), k=n) for token in (a, a + 512)][:n] for n in lengths]
    return [Sample(row, [0.0] + [1.0] * (len(row) - 1)) for row in rows]


def _train(tp: TPGroup, *, replays: bool, in_fp8: bool) -> tuple[list[float], list[float], int]:
    """Losses and gradient norms of all steps, and how many of them were replayed."""
    trainer, replayed = _trainer(tp, in_fp8=in_fp8), 0
    if replays:
        recorder = GraphCache(trainer.model, keep=True, min_replays=0)  # every capture pays, so that several are made
        assert trainer.record_passes(recorder)
        run = recorder.run

        def count(*args: object, **kwargs: object) -> object:
            nonlocal replayed
            replayed += 1
            return run(*args, **kwargs)  # type: ignore[arg-type]

        recorder.run = count  # type: ignore[method-assign, assignment]
    results = [trainer.step(_samples(lengths, seed)) for seed, lengths in enumerate(STEPS)]
    assert not any(result.skipped for result in results)
    for result in results[3:]:  # the first ones compile
        phases = (result.forward_seconds, result.backward_seconds, result.optimizer_seconds)
        assert min(phases) > 1e-4, "seconds of the device, replayed or not"
        assert 0.8 < sum(phases) / result.step_seconds < 1.01
    return [r.loss for r in results], [r.grad_norm for r in results], replayed


def _check_replay(tp: TPGroup, in_fp8: bool) -> None:
    torch.cuda.set_device(tp.rank)
    if tp.size > 1:
        tp = TPGroup.world("nccl", datetime.timedelta(seconds=60))
    losses, norms, _ = _train(tp, replays=False, in_fp8=in_fp8)
    replayed_losses, replayed_norms, count = _train(tp, replays=True, in_fp8=in_fp8)
    print(losses, replayed_losses, norms, replayed_norms, sep="\n")
    assert losses[-1] < losses[0] - 0.5, losses
    assert count == 2 + 3 * 4 + 2 + 2, "the four of a step are like the one of the step before"
    # attention adds the gradients of its blocks in any order, in bf16 that is 2^-9 of each; 12 steps carry it on. FP8 makes
    # 2^-3 of what lies next to the middle of two values
    assert replayed_losses == pytest.approx(losses, rel=2e-2 if in_fp8 else 5e-3)
    assert replayed_norms == pytest.approx(norms, rel=0.15 if in_fp8 else 5e-2)
    if tp.size > 1:
        assert tp.peers.buffers is not None, "the sums did not go through peer memory"


@pytest.mark.parametrize("in_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.multigpu)])
def test_replayed_steps_train_as_others_do(size: int, in_fp8: bool) -> None:
    run_ranks(_check_replay, size, in_fp8, deadline_seconds=240)


def _reuses_memory() -> tuple[bool, bool]:
    """Whether memory that two streams used goes back to the device, and whether pinned memory is used again."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    other, block = torch.cuda.Stream(), torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device="cuda")
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        block.add_(1)
    block.record_stream(other)
    pinned = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    block.copy_(pinned, non_blocking=True)
    address = pinned.data_ptr()
    del block, pinned
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    is_reused = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True).data_ptr() == address
    return torch.cuda.memory_reserved() == before, is_reused


def _check_failed_capture(_tp: TPGroup, kind: str) -> None:
    """In a process of its own: what a failed capture leaves would disturb other tests."""
    assert _reuses_memory() == (True, True)
    torch.cuda.empty_cache()
    pool, before, stream = torch.cuda.graph_pool_handle(), torch.cuda.memory_reserved(), torch.cuda.current_stream()
    source = torch.ones(BLOCK_BYTES, dtype=torch.uint8, device="cuda")
    with pytest.raises((RuntimeError, ValueError)):  # noqa: PT012, SIM117
        with capture(pool):
            kept = source + source
            if kind == "invalidated":
                kept.sum().item()  # waits for the device, which CUDA does not allow: it invalidates the capture
            raise ValueError("a capture that is still valid")
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    del kept, source
    gc.collect()  # the error's frames
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before, "the pool keeps its memory"
    assert _reuses_memory() == (True, True)
    source, result = torch.ones(3, device="cuda"), None
    with capture(pool) as graph:  # the same pool, another capture
        result = source * 2
    source.fill_(4)
    graph.replay()
    assert result.tolist() == [8.0] * 3


@pytest.mark.parametrize("kind", ["invalidated", "valid"])
def test_a_capture_that_fails_leaves_the_allocators_as_they_were(kind: str) -> None:
    """torch ends the use of a pool only where CUDA ends the capture without an error. What then stays open keeps memory from
    being used again, step by step, until there is none."""
    run_ranks(_check_failed_capture, 1, kind, deadline_seconds=120)
