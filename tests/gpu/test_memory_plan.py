"""The plan against what real steps on a GPU take: one rank in this process, without a server."""

from __future__ import annotations

import gc
import logging
import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from apollo_tp.config import GradientMode, OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import DeviceMemoryError
from apollo_tp.model import bind_model
from apollo_tp.model.loss import VocabShard, nll_sum, unit
from apollo_tp.optim import Optimizer
from apollo_tp.shards.boxes import Shard
from apollo_tp.training.memory_plan import MARGIN
from apollo_tp.training.memory_profiling import CudaMeter, plan_memory
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SEQUENCE = 1024
SLACK = 32 * 2**20
"""Bytes by which small figures may be off: workspaces and tables, whatever the model."""
CONFIG = Qwen3Config(
    vocab_size=131072, hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=False,
    architectures=["Qwen3ForCausalLM"],
)  # fmt: skip
"""Large enough that gradients, activations and logits each take some hundred MB; 512 tokens fill a chunk of the loss."""


@pytest.fixture(autouse=True)
def _allocator() -> Iterator[None]:
    """The trainer's allocator (expandable segments, not for the servers of other tests); what other tests left unused,
    and what this one leaves, goes back to the device."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    yield
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    gc.collect()
    torch.cuda.empty_cache()


def make_trainer(mode: GradientMode, *, recompute: bool, max_tokens: int) -> Trainer:
    device, tp = torch.device("cuda", 0), TPGroup.single()
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(CONFIG).named_parameters()}
    shards: dict[str, tuple[Shard, Tensor]] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        shards[name] = (
            Shard(name, shape, None, (), (0,)),
            tensor.normal_(0, 0.02) if len(shape) > 1 else tensor.fill_(1),
        )
    model = bind_model(CONFIG, shards, tp, gradient_checkpointing=recompute)
    clip = None if mode is GradientMode.in_backward else 1.0
    optim = OptimConfig(lr=1e-6, max_grad_norm=clip, max_relative_update=1e9)
    optimizer = Optimizer(optim, Precision.remainder, model.parameters, tp)
    return Trainer(model, optimizer, tp, device=device, max_micro_batch_tokens=max_tokens, gradients=mode)


def samples(count: int, tokens: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, CONFIG.vocab_size, (tokens,), generator=draw).tolist() for _ in range(count)]
    return [Sample(row, [0.0] + [1.0] * (tokens - 1)) for row in rows]


def values(trainer: Trainer) -> list[Tensor]:
    return [p.tensor.clone() for p in trainer.model.parameters]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", [GradientMode.stored, GradientMode.in_backward], ids=["stored", "in_backward"])
@pytest.mark.parametrize("max_tokens", [1024, 8192, 32768])
def test_the_planned_peak_is_that_of_a_real_step(max_tokens: int, mode: GradientMode, recompute: bool) -> None:
    """Within MARGIN below (what is asked for on top) and twice that above. The plan runs at most 2048 tokens unless it finds
    that this does not tell; a stored step has two micro-batches, since the plan is for that."""
    trainer = make_trainer(mode, recompute=recompute, max_tokens=max_tokens)
    before = values(trainer)
    plan = plan_memory(trainer, CudaMeter(trainer.device), SEQUENCE)
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, trainer.model.parameters, strict=True)), "it wrote"
    del before
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    micro_batches = 1 if mode is GradientMode.in_backward else 2
    result = trainer.step(samples(micro_batches * max_tokens // SEQUENCE, SEQUENCE))
    assert (result.num_micro_batches, result.gradients) == (micro_batches, mode.value)
    assert result.skipped == ""
    measured = torch.cuda.max_memory_allocated() - base
    planned = plan.gradients + max(plan.activations, plan.optimizer)
    print(
        f"{max_tokens} {mode.value} recompute={recompute}: planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB"
    )
    assert planned >= measured / (1 + MARGIN) - SLACK
    assert planned <= measured * (1 + 2 * MARGIN) + SLACK
    assert plan.largest == max_tokens
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - base <= SLACK, "a step leaves nothing that the plan did not see"


@pytest.mark.parametrize(("room_gb", "longest_trial"), [(6, SEQUENCE), (12, 4 * SEQUENCE)])
def test_the_number_of_tokens_that_it_offers_fits_and_more_does_not(
    room_gb: int, longest_trial: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused with a number; that number is accepted, and a step of it runs in what is there. With 6 GB a trial of 4,096
    tokens runs out, with 12 GB all trials fit."""
    caplog.set_level(logging.DEBUG, "apollo_tp.training.memory_profiling")
    trainer = make_trainer(GradientMode.stored, recompute=False, max_tokens=1 << 20)
    meter = CudaMeter(trainer.device)
    torch.cuda.empty_cache()
    ballast = torch.empty(meter.available() - room_gb * 10**9, dtype=torch.uint8, device=trainer.device)
    before = values(trainer)
    with pytest.raises(DeviceMemoryError) as refused:
        plan_memory(trainer, meter, SEQUENCE)
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, trainer.model.parameters, strict=True)), "it wrote"
    del before
    text = str(refused.value)
    print(text, *caplog.messages, sep="\n")
    assert "rank 0: got " in text
    assert "train.max_micro_batch_tokens=1048576" in text
    offered = re.search(r"lower (?:train\.max_micro_batch_tokens|it) to (\d+), which would fit", text)
    assert offered is not None
    fits = int(offered[1])
    assert fits > longest_trial
    trainer.max_micro_batch_tokens = fits // SEQUENCE * SEQUENCE
    assert plan_memory(trainer, meter, SEQUENCE).missing <= 0
    result = trainer.step(samples(2 * trainer.max_micro_batch_tokens // SEQUENCE, SEQUENCE))
    assert (result.num_micro_batches, result.skipped) == (2, "")
    assert math.isfinite(result.loss)
    trainer.max_micro_batch_tokens = 2 * fits
    with pytest.raises(DeviceMemoryError):
        plan_memory(trainer, meter, SEQUENCE)
    del ballast


def test_the_heads_gradient_over_many_chunks_is_added_up_in_fp32() -> None:
    """On the device, against the products of all chunks added up in fp32; its error is that of one rounding."""
    torch.manual_seed(0)
    tokens, rows, width = 4096, 512, 256
    hidden = torch.randn(tokens, width, device="cuda").bfloat16() + 1
    weight = torch.zeros(rows, width, device="cuda").bfloat16().requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    vocab = VocabShard(0, TPGroup.single(), chunk_bytes=4 * rows * 16)
    nll_sum(hidden, weight, targets, torch.ones(tokens, device="cuda"), vocab)[0].backward(unit(hidden.device))
    share = torch.full((tokens, rows), 1 / rows, device="cuda")
    share[:, 0] -= 1
    expected = share.bfloat16().double().T @ hidden.double()
    assert weight.grad is not None
    assert ((weight.grad.double() - expected).norm() / expected.norm()).item() < 2**-8


def test_no_room_for_gradients_is_refused_without_running_out() -> None:
    trainer = make_trainer(GradientMode.stored, recompute=True, max_tokens=1024)
    meter = CudaMeter(trainer.device)
    torch.cuda.empty_cache()
    ballast = torch.empty(meter.available() - 10**8, dtype=torch.uint8, device=trainer.device)
    with pytest.raises(DeviceMemoryError, match=r"got 0\.\d\d GB free on its GPU") as refused:
        plan_memory(trainer, meter, SEQUENCE)
    assert "gradient_checkpointing" not in str(refused.value), "it is on already"
    del ballast
