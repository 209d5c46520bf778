"""Compare a bound model with the single-process Hugging Face model: loss, log-probabilities and every gradient."""

from __future__ import annotations

import random
import traceback
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import BoundModel, bind_model
from apollo_tp.model.batch import PackedBatch, pack
from apollo_tp.shards.boxes import Shard
from apollo_tp.wire.commands import Sample
from tests.support.families import CASES, FIRST_SPECIAL_TOKEN, VOCAB_SIZE, Case
from tests.support.served import map_case

Results = list[dict[str, dict[str, float] | str]]
"""Per rank and case: errors by tensor, or a traceback."""
LENGTHS = (37, 5, 20, 29, 2, 41, 11)


def samples(vocab_size: int = VOCAB_SIZE, seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
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


def reference_gradients(model: PreTrainedModel, batch: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """Weighted mean loss, and its gradient by checkpoint tensor name."""
    model.zero_grad()
    total = sum(sum(sample.weights) for sample in batch)
    loss = torch.zeros(())
    for sample, logprobs in zip(batch, reference_logprobs(model, batch), strict=True):
        loss = loss - (torch.tensor(sample.weights[1:]) * logprobs).sum() / total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), revert_weight_conversion(model, gradients)


def train_gradients(bound: BoundModel, batches: list[PackedBatch]) -> float:
    """Accumulate over all micro-batches as the trainer does; returns the weighted mean loss."""
    bound.zero_grad()
    total = sum(batch.weight_sum for batch in batches)
    loss = 0.0
    for batch in batches:
        sums = bound.forward_loss(batch)
        (sums.loss / total).backward()
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
    share = float(whole.norm()) * (expected.numel() / whole.numel()) ** 0.5
    return float((got - expected).norm()) / max(float(expected.norm()), share, 1e-30)


def check_case(tp: TPGroup, case: Case, checkpoint: Path) -> dict[str, float]:
    """Relative errors by name ("loss", "logprobs" and every checkpoint tensor) on this rank."""
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    mapped = map_case(checkpoint, tp)
    bound = bind_model(
        config, mapped.tensors, tp, fused_tensors=mapped.fused_tensors,
        gradient_checkpointing=case.gradient_checkpointing,
    )  # fmt: skip
    batch = samples(config.get_text_config().vocab_size)
    _insert(batch, _like_padding(config, bound, tp))
    loss, gradients = reference_gradients(model, batch)
    with torch.no_grad():
        logprobs = reference_logprobs(model, batch)
    batches = pack(batch, case.max_tokens)
    got = train_gradients(bound, batches)
    errors = {"loss": abs(got - loss) / abs(loss), "logprobs": _logprob_error(bound, batches, batch, logprobs)}
    for parameter in bound.parameters:
        expected = gradients[parameter.name]
        part = local_part(expected, parameter.shard)
        served = mapped.tensors[parameter.name][1]
        assert parameter.tensor.data_ptr() == served.data_ptr(), f"{parameter.name} was copied"
        assert parameter.grad is not None, parameter.name
        errors[parameter.name] = relative_error(parameter.grad, part, expected)
    assert set(errors) - {"loss", "logprobs"} == set(gradients), "a gradient is missing"
    assert all("vision" in name or "visual" in name or "projector" in name for name in bound.untouched)
    assert set(bound.untouched) | set(gradients) == set(mapped.tensors)
    return errors


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
            tokens = expected[index] * (weights != 0)
            worst = max(worst, float((got.tokens[start : stop - 1] - tokens).abs().max()))
            worst = max(worst, abs(float(got.sequences[s] - (weights * tokens).sum())) / len(weights))
    return worst


def run_cases(tp: TPGroup, folder: Path) -> dict[str, dict[str, float] | str]:
    """Errors by tensor per case on this rank, or the traceback where a case failed."""
    results: dict[str, dict[str, float] | str] = {}
    for name, case in CASES.items():
        try:
            results[name] = check_case(tp, case, folder / case.checkpoint)
        except Exception:  # noqa: BLE001 - reported by the case's own test
            results[name] = traceback.format_exc()
            break  # the other ranks are in another collective now: no later case can be trusted
    return results
