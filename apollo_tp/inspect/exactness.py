"""A bound model against the single-process Hugging Face model: loss, log-probabilities and every gradient.

Both in fp32, over the layout of vLLM's own loader (manifests without a server) and with the values of the checkpoint's
files. The suite of families runs this at several tensor-parallel sizes, ``python -m apollo_tp.inspect MODEL --try`` on a
small copy of a model.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import BoundModel, bind_model
from apollo_tp.model.batch import PackedBatch, pack
from apollo_tp.model.towers import auto_class
from apollo_tp.shards.boxes import Shard
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import MappedRank, map_rank, verify_against_checkpoint
from apollo_tp.wire.commands import Sample

LENGTHS = (37, 5, 20, 29, 2, 41, 11)
FIRST_SPECIAL_TOKEN = 998
"""Samples have tokens below this: image tokens of small models with a vision tower come after it."""


@dataclass(frozen=True)
class Comparison:
    """``errors``: relative ones by checkpoint tensor and of the "loss", and of the "logprobs" in nats, on this rank;
    ``gradients``: the single-process model's, by checkpoint tensor."""

    errors: dict[str, float]
    bound: BoundModel
    mapped: MappedRank
    gradients: dict[str, Tensor]


def compare(
    tp: TPGroup, checkpoint: Path, *, max_tokens: int = 256, gradient_checkpointing: bool = False
) -> Comparison:
    """Train one step's gradients both ways. ``checkpoint`` has the manifests of this size in ``tp<size>``. Collective.

    Raises UnsupportedModelError for a model that cannot be bound.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    model = auto_class(config).from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    mapped = map_copy(checkpoint, tp)
    bound = bind_model(
        config,
        mapped.tensors,
        tp,
        fused_tensors=mapped.fused_tensors,
        gradient_checkpointing=gradient_checkpointing,
    )
    batch = samples(config.get_text_config().vocab_size)
    _insert(batch, _like_padding(config, bound, tp))
    logprobs = reference_logprobs(model, batch)
    loss, gradients = reference_gradients(model, batch, logprobs)
    batches = pack(batch, max_tokens)
    got = train_gradients(bound, batches)
    errors = {"loss": abs(got - loss) / abs(loss), "logprobs": _logprob_error(bound, batches, batch, logprobs)}
    for parameter in bound.parameters:
        if (expected := gradients.get(parameter.name)) is None or parameter.grad is None:
            errors[parameter.name] = float("inf")
            continue
        errors[parameter.name] = relative_error(parameter.grad, local_part(expected, parameter.shard), expected)
    return Comparison(errors, bound, mapped, gradients)


def map_copy(checkpoint: Path, tp: TPGroup) -> MappedRank:
    """What a trainer rank would map of a server of ``checkpoint`` at this size, with the checkpoint's values in it. The
    folder may have been moved since it was traced."""
    manifests = read_instance(checkpoint / f"tp{tp.size}")
    mine = manifests[tp.rank]
    allocations = []
    for allocation in mine.allocations:
        descriptor = os.memfd_create("served")
        os.ftruncate(descriptor, allocation.num_bytes)
        allocations.append(msgspec.structs.replace(allocation, handle=str(descriptor)))
    manifests[tp.rank] = msgspec.structs.replace(
        mine, pid=os.getpid(), model_path=str(checkpoint), allocations=allocations
    )
    mapped = map_rank(manifests, tp.rank)
    files = {t.name: t.file for t in mine.checkpoint}
    for name, (shard, local) in mapped.tensors.items():
        with safe_open(checkpoint / files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        for box, start in shard.boxes:
            index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            target = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
            target.copy_(tensor[index])
    assert verify_against_checkpoint(mapped, -1) == len(mapped.tensors)
    for descriptor in (int(a.handle) for a in allocations):
        os.close(descriptor)
    return mapped


def samples(vocab_size: int = 1003, seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    """Random sequences with uneven weights; the first quarter of each is context only."""
    draw = random.Random(seed)
    result = []
    for length in lengths:
        weights = [0.0 if i == 0 or i < length // 4 else draw.choice([0.5, 1.0, 2.0]) for i in range(length)]
        result.append(Sample([draw.randrange(min(vocab_size, FIRST_SPECIAL_TOKEN)) for _ in range(length)], weights))
    return result


def reference_logprobs(model: PreTrainedModel, batch: list[Sample]) -> list[Tensor]:
    """Per sample: log-probability of each token but the first, from one unpacked forward pass each."""
    result = []
    for sample in batch:
        ids = torch.tensor(sample.token_ids)
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        result.append(logprobs.gather(1, ids[1:, None])[:, 0])
    return result


def reference_gradients(
    model: PreTrainedModel, batch: list[Sample], logprobs: list[Tensor] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Weighted mean loss, and its gradient by checkpoint tensor name; ``logprobs``: ``reference_logprobs`` of it, if
    they were computed before, with their graph."""
    model.zero_grad()
    total = sum(sum(sample.weights) for sample in batch)
    loss = torch.zeros(())
    for sample, of_sample in zip(batch, logprobs or reference_logprobs(model, batch), strict=True):
        loss = loss - (torch.tensor(sample.weights[1:]) * of_sample).sum() / total
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), revert_weight_conversion(model, gradients)


def train_gradients(bound: BoundModel, batches: list[PackedBatch]) -> float:
    """Accumulate over all micro-batches as the trainer does; returns the weighted mean loss."""
    bound.zero_grad()
    total = sum(batch.weight_sum for batch in batches)
    loss = 0.0
    for batch in batches:
        sums = bound.forward_loss(batch)
        (sums.loss / total).backward()  # type: ignore[no-untyped-call]
        loss += float(sums.loss.detach()) / total
    bound.finish_gradients()
    return loss


def local_part(tensor: Tensor, shard: Shard) -> Tensor:
    """The local part of a global tensor that ``shard`` describes."""
    if shard.dim is None:
        return tensor
    return torch.cat([tensor.narrow(shard.dim, a, b - a) for a, b in shard.ranges] or [tensor[:0]], shard.dim)


def relative_error(got: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected local part, or over the share that a part of this size
    has in the ``whole`` tensor's norm: single elements of a gradient may cancel to nearly nothing."""
    share = float(whole.norm()) * math.sqrt(expected.numel() / whole.numel())
    return float((got - expected).norm()) / max(float(expected.norm()), share, 1e-30)


def _like_padding(config: PretrainedConfig, bound: BoundModel, tp: TPGroup) -> list[int]:
    """The padding token, and the tokens whose row has its number on another rank: ordinary ones, which have a gradient."""
    text = config.get_text_config()
    if text.pad_token_id is None:
        return []
    starts = tp.all_gather(torch.tensor([bound.vocab.start])).tolist()
    return [start + text.pad_token_id for start in starts if start + text.pad_token_id < text.vocab_size]


def _insert(batch: list[Sample], tokens: list[int]) -> None:
    """Put ``tokens`` in the middle of the first sample, where they are both read and predicted."""
    batch[0].token_ids[10 : 10 + len(tokens)] = tokens


def _logprob_error(bound: BoundModel, batches: list[PackedBatch], batch: list[Sample], expected: list[Tensor]) -> float:
    """Largest absolute difference of a per-token log-probability or of a sequence's weighted sum (nats)."""
    worst = 0.0
    for packed in batches:
        with torch.no_grad():
            got = bound.sequence_logprobs(packed)
        for s, index in enumerate(packed.sample_index):
            start, stop = int(packed.cu_seqlens[s]), int(packed.cu_seqlens[s + 1])
            weights = torch.tensor(batch[index].weights[1:])
            tokens = expected[index].detach() * (weights != 0)
            worst = max(worst, float((got.tokens[start : stop - 1] - tokens).abs().max()))
            worst = max(worst, abs(float(got.sequences[s] - (weights * tokens).sum())) / len(weights))
    return worst
