"""Packed attention with head sizes that differ, as in latent attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apollo_tp.model.attention import of_one_width, packed_attention

LENGTHS, HEADS = (5, 1, 9), 2


@pytest.mark.parametrize(("size", "width"), [(6, 4), (4, 6), (4, 4)])
def test_head_sizes_of_keys_and_values_may_differ(size: int, width: int) -> None:
    """Against plain products, sequence by sequence. Kernels with one head size get zeros, and give the same before column
    ``width``. The result can be viewed, as some models do."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, sum(LENGTHS), n, generator=generator, dtype=torch.float64) for n in (size, size, width)
    )
    packing = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 15]), "max_length_q": 9, "sequence_lengths": LENGTHS}
    found, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **packing)
    assert found.shape == (1, sum(LENGTHS), HEADS, width)
    found = found.view(sum(LENGTHS), HEADS, width)
    wide, scale = of_one_width(query, key, value, None)[:3], of_one_width(query, key, value, None)[3]
    assert {tensor.shape[-1] for tensor in wide} == {max(size, width)}
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        q, k, v = (t[0, :, rows] for t in (query, key, value))
        scores = (q @ k.mT / size**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        expected = scores.softmax(-1) @ v
        torch.testing.assert_close(found[rows].transpose(0, 1), expected)
        padded = F.scaled_dot_product_attention(*(t[0, :, rows] for t in wide), is_causal=True, scale=scale)
        torch.testing.assert_close(padded[..., :width], expected)
        start += length
