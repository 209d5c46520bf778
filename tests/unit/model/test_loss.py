"""The chunked log-probabilities and their weighted sum equal log_softmax and its gradients in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model.loss import LogitsTransform, VocabShard, nll_sum, target_logprobs, unit

TOKENS, ROWS, WIDTH = 13, 29, 8


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(ROWS, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(TOKENS, generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
@pytest.mark.parametrize(
    "transform",
    [LogitsTransform(), LogitsTransform(scale=0.25), LogitsTransform(softcap=2.0), LogitsTransform(0.5, 3.0)],
)
def test_values_and_gradients_equal_log_softmax(chunk_tokens: int, transform: LogitsTransform) -> None:
    """fp32; chunks only change the order of sums."""
    vocab = VocabShard(0, TPGroup.single(), transform, chunk_bytes=4 * ROWS * chunk_tokens)
    hidden, weight, targets, upstream = _inputs()
    expected = transform(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected_grads = torch.autograd.grad(expected, (hidden, weight), upstream)
    got, correct = target_logprobs(hidden, weight, targets, vocab)
    grads = torch.autograd.grad(got, (hidden, weight), upstream)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mine, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    assert torch.equal(correct, (hidden @ weight.T).argmax(-1) == targets)
    total, hits = nll_sum(hidden, weight, targets, upstream, vocab)
    grads = torch.autograd.grad(total / 3, (hidden, weight))
    torch.testing.assert_close(total, -(upstream * expected).sum(), rtol=1e-5, atol=1e-5)
    for mine, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, -reference / 3, rtol=1e-4, atol=1e-5)
    assert torch.equal(hits, correct)
    total, _ = nll_sum(hidden, weight, targets, upstream, vocab)
    for mine, reference in zip(
        torch.autograd.grad(total, (hidden, weight), unit(total.device)), expected_grads, strict=True
    ):
        torch.testing.assert_close(mine, -reference, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_and_no_gradients_at_all() -> None:
    """The sum without a gradient of the head, and under no_grad: the same value."""
    hidden, weight, targets, upstream = _inputs()
    vocab = VocabShard(0, TPGroup.single())
    total, _ = nll_sum(hidden, weight, targets, upstream, vocab)
    (expected,) = torch.autograd.grad(total, hidden)
    frozen, _ = nll_sum(hidden, weight.detach(), targets, upstream, vocab)
    (got,) = torch.autograd.grad(frozen, hidden)
    assert torch.equal(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(nll_sum(hidden, weight, targets, upstream, vocab)[0], total.detach())


def test_large_logits_stay_finite() -> None:
    """The maximum is taken out before exponentials: logits of 1e4 neither overflow nor lose the target."""
    hidden, weight, targets, _ = _inputs()
    got, _ = target_logprobs(hidden * 1e4, weight, targets, VocabShard(0, TPGroup.single()))
    expected = (hidden * 1e4 @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("summed", [False, True])
def test_no_tokens_give_zero_gradients(summed: bool) -> None:
    """A micro-batch of context alone still has a backward pass."""
    hidden, weight, targets, upstream = _inputs()
    vocab = VocabShard(0, TPGroup.single())
    if summed:
        got, _ = nll_sum(hidden[:0], weight, targets[:0], upstream[:0], vocab)
    else:
        got, _ = target_logprobs(hidden[:0], weight, targets[:0], vocab)
    got.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_logits_of_all_tokens_never_exist() -> None:
    """No tensor as large as [tokens, vocabulary] is allocated, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, rows = 64, 512
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(rows, 4, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    vocab = VocabShard(0, TPGroup.single(), chunk_bytes=4 * rows * 8)
    with Watch():
        target_logprobs(hidden, weight, targets, vocab)[0].sum().backward()
        nll_sum(hidden, weight, targets, torch.ones(tokens), vocab)[0].backward()
    assert largest == 8 * rows, "a chunk of 8 tokens is the largest tensor"


@pytest.mark.parametrize("scaled", [False, True])
def test_only_a_factor_other_than_one_costs_a_pass_over_the_gradient(scaled: bool) -> None:
    """autograd hands the root's gradient on as it is: ``unit`` is recognised by its memory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    scalings = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mul_.Tensor:
                scalings.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    hidden, weight, targets, upstream = _inputs()
    total, _ = nll_sum(hidden, weight, targets, upstream, VocabShard(0, TPGroup.single()))
    with Watch():
        (total / 3 if scaled else total).backward(unit(total.device))
    assert (weight.shape in scalings) is scaled


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 64], ids=["256 chunks", "64 chunks", "4 chunks"])
@pytest.mark.parametrize("summed", [True, False], ids=["nll_sum", "target_logprobs"])
def test_the_heads_gradient_does_not_lose_bits_with_the_number_of_chunks(tokens_per_chunk: int, summed: bool) -> None:
    """In bf16, against the sum of the same chunks' products in fp64. The last rounding is a half of 2 ** -8, some roundings
    of few chunks two of them; 256 roundings would be ten."""
    torch.manual_seed(0)
    tokens, rows, width = 256, 32, 16
    hidden = torch.randn(tokens, width).bfloat16() + 1  # of one sign, as additions to a growing sum are worst
    weight = torch.zeros(rows, width).bfloat16().requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64)
    vocab = VocabShard(0, TPGroup.single(), chunk_bytes=4 * rows * tokens_per_chunk)
    if summed:
        nll_sum(hidden, weight, targets, torch.ones(tokens), vocab)[0].backward(unit(hidden.device))
    else:
        (-target_logprobs(hidden, weight, targets, vocab)[0]).sum().backward()
    share = torch.full((tokens, rows), 1 / rows)  # logits of 0
    share[:, 0] -= 1
    expected = share.bfloat16().double().T @ hidden.double()
    assert weight.grad is not None
    error = ((weight.grad.double() - expected).norm() / expected.norm()).item()
    assert error < 2**-8, f"got {error:.2g}"
