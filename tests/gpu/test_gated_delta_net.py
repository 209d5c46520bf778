"""Gated delta nets on a GPU: flash-linear-attention's kernel, packed, against transformers' plain torch, one by one."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from apollo_tp.model import recurrent

LENGTHS = (300, 64, 148)
HEADS, WIDTH = 24, 128
"""A rank's share of Qwen3.5-27B at TP = 2."""


def test_the_kernel_agrees_with_plain_torch_and_keeps_boundaries() -> None:
    """bf16 in and out. Both accumulate in fp32, but the kernel rounds products between its chunks' matrices to bf16
    (2^-9 relative each): 1 % of the norm of an output, 2 % of a gradient, which has twice as many of them."""
    if recurrent._flash_linear_attention() is None:
        pytest.skip("flash-linear-attention is not installed, or has no right backward pass here")
    plain = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    packed = recurrent._packed_recurrence(plain)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, sum(LENGTHS), HEADS, *shape, generator=generator, device="cuda")

    states = [draw(WIDTH).bfloat16() for _ in range(3)]
    # decays as a trained layer has them, near 1
    gates = {"g": -torch.nn.functional.softplus(draw() - 2), "beta": draw().sigmoid().bfloat16()}
    weights = draw(WIDTH).bfloat16()

    def run(boundaries: dict[str, object]) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*states, *gates.values())]
        keywords = dict(zip(gates, leaves[3:], strict=True)) | {"use_qk_l2norm_in_kernel": True}
        if boundaries:
            output = packed(*leaves[:3], **keywords, **boundaries)[0]
        else:
            pieces = [leaf.split(LENGTHS, dim=1) for leaf in leaves]
            output = torch.cat(
                [
                    plain(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
                    for q, k, v, g, beta in zip(*pieces, strict=True)
                ],
                dim=1,
            )
        return [output, *torch.autograd.grad(output, leaves, weights)]

    offsets = torch.tensor([0, 300, 364, 512], dtype=torch.int32, device="cuda")
    found = run({"cu_seqlens": offsets, "sequence_lengths": LENGTHS})
    expected = run({})
    errors = {
        name: float((a.float() - b.float()).norm() / b.float().norm())
        for name, a, b in zip(("output", "query", "key", "value", "g", "beta"), found, expected, strict=True)
    }
    print(errors)
    assert errors["output"] < 0.01, errors
    assert max(errors.values()) < 0.02, errors
