"""Attention sinks against transformers' attention, and the formulas of the path through FlashAttention against autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from apollo_tp.inspect.exactness import relative_error
from apollo_tp.model.attention import packed_attention
from apollo_tp.model.sinks import gradient_of_scores_of_sinks, include_sinks

LENGTHS = (7, 1, 12)
HEADS, KV_HEADS, WIDTH = 4, 2, 8
TOLERANCE = 2e-6
"""Of norms, in fp32: sums of up to 20 products, in another order."""


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def _causal(length: int, window: int | None) -> Tensor:
    """[length, length]: 0 where a token sees another, else -inf."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    return torch.zeros(length, length).masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_with_sinks_is_that_of_each_sequence_alone(window: int | None) -> None:
    """Output and all gradients, those of the sinks too; fp32."""
    total = sum(LENGTHS)
    query, key, value = _drawn(1, HEADS, total, WIDTH), _drawn(1, KV_HEADS, total, WIDTH), _drawn(1, 2, total, WIDTH)
    sinks, weights = _drawn(HEADS), torch.linspace(-1, 1, total * HEADS * WIDTH).view(1, total, HEADS, WIDTH)
    layer = SimpleNamespace(sinks=sinks, num_key_value_groups=HEADS // KV_HEADS, training=False)
    expected = torch.cat(
        [
            eager_attention_forward(layer, *sequence, _causal(sequence[0].shape[2], window), scaling=0.3)[0]
            for sequence in zip(*(t.split(LENGTHS, dim=2) for t in (query, key, value)), strict=True)
        ],
        dim=1,
    )
    packing = {"cu_seq_lens_q": torch.tensor([0, 7, 8, 20]), "max_length_q": 12, "sequence_lengths": LENGTHS}
    found, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window, s_aux=sinks, **packing
    )
    leaves = (query, key, value, sinks)
    for mine, its in zip(
        [found, *torch.autograd.grad(found, leaves, weights)],
        [expected, *torch.autograd.grad(expected, leaves, weights)],
        strict=True,
    ):
        assert relative_error(mine.detach(), its.detach(), its.detach()) < TOLERANCE


def test_a_kernel_that_knows_no_sinks_is_exact_with_an_output_and_a_sum_that_include_them() -> None:
    """torch's FlashAttention for CPUs stands in for the one on GPUs: both derive the gradient of the scores from output and
    log-sum-exp. The sinks are large, so that they take half of the weight."""
    shape = (1, HEADS, 12, WIDTH)
    query, key, value, grad = (_drawn(*shape).detach() + shift for shift in (0.0, 0.1, 0.2, 0.3))
    sinks = torch.tensor([1.0, 2.0, 3.0, -1.0])
    aten, options = torch.ops.aten, {"scale": 0.3}
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, **options)
    out, lse = include_sinks(out, lse, sinks[:, None])
    found = [
        out,
        *aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, True, **options
        ),
        gradient_of_scores_of_sinks(grad, out, lse, sinks[:, None]).sum((0, 2)),
    ]
    leaves = [t.requires_grad_() for t in (query, key, value, sinks)]
    scores = leaves[0] @ leaves[1].transpose(2, 3) * 0.3 + _causal(12, None)
    scores = torch.cat([scores, leaves[3][:, None, None].expand(1, HEADS, 12, 1)], dim=-1)
    expected = scores.softmax(-1)[..., :-1] @ leaves[2]
    for mine, its in zip(found, [expected, *torch.autograd.grad(expected, leaves, grad)], strict=True):
        assert relative_error(mine.detach(), its.detach(), its.detach()) < TOLERANCE
