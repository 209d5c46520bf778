"""Attention with DeepSeek's head sizes on a GPU, packed and alone, against plain products of each sequence by itself."""

from __future__ import annotations

import pytest
import torch

from apollo_tp.model.attention import packed_attention


@pytest.mark.parametrize("lengths", [(300, 64, 148), (512,)])
@pytest.mark.parametrize(("size", "width"), [(192, 128), (96, 64)])
def test_head_sizes_of_keys_and_values_may_differ(lengths: tuple[int, ...], size: int, width: int) -> None:
    """bf16 against fp32 of the same numbers, which goes sequence by sequence; 2 % of a norm as for sinks."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    total, heads = sum(lengths), 16
    states, weights = [draw(1, heads, total, n) for n in (size, size, width)], draw(1, total, heads, width)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    packing = {"cu_seq_lens_q": offsets, "max_length_q": max(lengths), "sequence_lengths": lengths}

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in states]
        out, _ = packed_attention(torch.nn.Identity(), *leaves, None, **packing)
        assert out.shape == weights.shape
        assert out.is_contiguous()
        return [out, *torch.autograd.grad(out, leaves, weights.to(dtype))]

    pairs = zip(run(torch.bfloat16), run(torch.float32), strict=True)
    assert max(float((a.float() - b).norm() / b.norm()) for a, b in pairs) < 0.02
