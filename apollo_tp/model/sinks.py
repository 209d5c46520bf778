"""Attention sinks: a logit for each head that takes part in the softmax of every query and has no value (gpt-oss).

With a head's log-sum-exp ``lse`` of scores, attention without its sink times ``sigmoid(lse - sink)`` is attention with it.
The backward pass needs no kernel of its own either: FlashAttention's computes probabilities as ``exp(score - lse)`` and the
softmax's gradient from the output, so it is exact with a log-sum-exp and an output that include the sink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def include_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention ``out`` [..., d] and the log-sum-exp of its scores fp32 [...], both without sinks, to the same with them.

    ``sinks`` is broadcast to the shape of ``lse``. Local, no collective; the output keeps its dtype.
    """
    with_sinks = torch.logaddexp(lse, sinks.float())
    return (out * torch.exp(lse - with_sinks)[..., None]).to(out.dtype), with_sinks


def gradient_of_scores_of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of the sink of each head and query, fp32 of the shape of ``lse``, from that of ``out`` [..., d]; ``out``
    and ``lse`` include the sinks. Local, no collective."""
    return -torch.exp(sinks.float() - lse) * (grad.float() * out.float()).sum(-1)


class FlashWithSinks(torch.autograd.Function):
    """Causal attention of packed sequences with sinks through torch's FlashAttention, CUDA only; local, no collective.

    ``query`` [T, q_heads, d], ``key`` and ``value`` [T, kv_heads, d] in bf16 or fp16, ``sinks`` [q_heads], ``cu_seqlens``
    int32 [S + 1] to [T, q_heads, d]. ``window`` as in ``packed_attention``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        ctx.lengths = (cu_seqlens, cu_seqlens, longest, longest, 0.0, window is None)
        left = -1 if window is None else window - 1
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        out, lse, *rng_state = torch.ops.aten._flash_attention_forward(
            query, key, value, *ctx.lengths, False, **ctx.options
        )
        out, lse = include_sinks(out, lse.T, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse.T.contiguous(), *rng_state[:2])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, out, lse, *rng_state = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, out, lse, *ctx.lengths, *rng_state, **ctx.options
        )
        of_sinks = gradient_of_scores_of_sinks(grad, out, lse.T, sinks).sum(0).to(sinks.dtype)
        return *grads, of_sinks, None, None, None, None
