"""Vocabulary-parallel log-probabilities over uneven and empty shards, and what they cost in collectives."""

from __future__ import annotations

import pytest
import torch

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model.loss import LogitsTransform, VocabShard, logprobs_with_entropy, nll_sum, target_logprobs
from tests.support.ranks import run_ranks

TOKENS, WIDTH = 17, 8
SPLITS = {2: [(0, 40), (40, 61)], 4: [(0, 16), (16, 32), (32, 35), (35, 35)]}


def _compare(tp: TPGroup, bounds: list[tuple[int, int]]) -> dict[str, float | dict[str, int]]:
    start, stop = bounds[tp.rank]
    rows = bounds[-1][1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(rows, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    chunk_bytes = 4 * 5 * -(-rows // tp.size)  # chunks of 5 tokens, where ranks have equally many rows
    transform = LogitsTransform(0.7, 5.0)
    expected = transform(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected_hidden, expected_weight = torch.autograd.grad(expected, (hidden, weight), upstream)
    local = weight.detach()[start:stop].clone().requires_grad_()
    before = dict(tp.traffic)
    got, correct = target_logprobs(hidden, local, targets, VocabShard(start, tp, transform, chunk_bytes=chunk_bytes))
    forward = tp.traffic["all_reduce"] - before.get("all_reduce", 0)
    got_hidden, got_weight = torch.autograd.grad(got, (hidden, local), upstream)
    backward = tp.traffic["all_reduce"] - before.get("all_reduce", 0) - forward
    vocab = VocabShard(start, tp, transform, global_rows=rows, chunk_bytes=chunk_bytes)
    total, summed_correct = nll_sum(hidden, local, targets, upstream, vocab)
    sum_hidden, sum_weight = torch.autograd.grad(total, (hidden, local))
    summed = tp.traffic["all_reduce"] - before.get("all_reduce", 0) - forward - backward
    hits = (hidden @ weight.T).argmax(-1) == targets
    inverse = torch.rand(TOKENS, generator=generator) + 0.5
    tempered = (transform(hidden @ weight.T) * inverse[:, None]).log_softmax(-1)
    cold_hidden, cold_weight = torch.autograd.grad(
        tempered.gather(1, targets[:, None])[:, 0], (hidden, weight), upstream, retain_graph=True
    )
    of_chunks = VocabShard(start, tp, transform, chunk_bytes=chunk_bytes)
    cold, _, entropy = logprobs_with_entropy(hidden, local, targets, of_chunks, inverse)
    got_cold_hidden, got_cold_weight = torch.autograd.grad(cold, (hidden, local), upstream)
    return {
        "entropy": float((entropy + (tempered.exp() * tempered).sum(-1)).abs().max()),
        "tempered": float((cold - tempered.gather(1, targets[:, None])[:, 0]).abs().max()),
        "tempered, hidden": float((got_cold_hidden - cold_hidden).abs().max()),
        "tempered, weight": float((got_cold_weight - cold_weight[start:stop]).abs().sum()),
        "logprobs": float((got - expected).abs().max()),
        "hidden": float((got_hidden - expected_hidden).abs().max()),
        "weight": float((got_weight - expected_weight[start:stop]).abs().sum()),
        "correct": float((hits != correct).sum() + (hits != summed_correct).sum()),
        "sum": float((total + (upstream * expected).sum()).abs()),
        "sum, hidden": float((sum_hidden + expected_hidden).abs().max()),
        "sum, weight": float((sum_weight + expected_weight[start:stop]).abs().sum()),
        "forward_bytes": forward,
        "backward_bytes": backward,
        "summed_bytes": summed,
    }


@pytest.mark.parametrize("size", [2, 4])
def test_uneven_and_empty_vocabularies_equal_the_whole_one(size: int) -> None:
    """fp32: the normaliser is summed in another order. Traffic: [N] and [2, N] fp32 forward, [N, H] backward."""
    for result in run_ranks(_compare, size, SPLITS[size], deadline_seconds=240):
        assert result.pop("forward_bytes") == 3 * TOKENS * 4
        assert result.pop("backward_bytes") == TOKENS * WIDTH * 4
        assert result.pop("summed_bytes") == (3 + WIDTH) * TOKENS * 4
        assert result.pop("correct") == 0
        assert all(error < 1e-5 for error in result.values()), result
