"""Attention sinks on a GPU: FlashAttention with sinks, packed, against plain products of each sequence by itself."""

from __future__ import annotations

import pytest
import torch

from apollo_tp.model.attention import packed_attention

LENGTHS = (300, 64, 148)
HEADS, KV_HEADS, WIDTH = 16, 2, 64
"""A quarter of gpt-oss's heads."""


@pytest.mark.parametrize("window", [None, 128])
def test_flash_attention_with_sinks_agrees_with_plain_products(window: int | None) -> None:
    """bf16 against fp32 of the same numbers: bf16 keeps 2^-9 of each probability and each product, 2 % of a norm."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    total = sum(LENGTHS)
    states = [draw(1, heads, total, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    sinks, weights = draw(HEADS) + 2, draw(1, total, HEADS, WIDTH)
    offsets = torch.tensor([0, 300, 364, 512], dtype=torch.int32, device="cuda")
    packing = {"cu_seq_lens_q": offsets, "max_length_q": 300, "sequence_lengths": LENGTHS}

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (*states, sinks)]
        out, _ = packed_attention(
            torch.nn.Identity(), *leaves[:3], None, sliding_window=window, s_aux=leaves[3], **packing
        )
        return [out, *torch.autograd.grad(out, leaves, weights.to(dtype))]

    names = ("output", "query", "key", "value", "sinks")
    errors = {
        name: float((a.float() - b).norm() / b.norm())
        for name, a, b in zip(names, run(torch.bfloat16), run(torch.float32), strict=True)
    }
    print(errors)
    assert max(errors.values()) < 0.02, errors
