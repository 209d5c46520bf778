"""Causal attention over packed sequences, registered with transformers as ``apollo_packed``.

transformers builds no mask for an implementation whose masks it does not know; the sequence boundaries arrive here as
``cu_seq_lens_q``. On CUDA in bf16 or fp16 this is torch's variable-length FlashAttention, or cuDNN's for a single sequence,
which takes half the time on Hopper; everything else (CPU, fp32, soft-capped scores, wide heads) goes sequence by sequence
through scaled_dot_product_attention or plain matrix products. Attention sinks are in ``sinks``.

What a layer asks of its attention beyond that (a mask of its own, a position bias) is refused: it would be dropped without
a trace. ``trial`` compares the windows with the masks that transformers would make.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.boundaries import BoundariesMissingError
from apollo_tp.model.sinks import FlashWithSinks

# torch 2.13 has an argument for grouped-query attention; 2.11 has none and accepts fewer key heads without it.
_VARLEN_NAMES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

NAME = "apollo_packed"
_WITHOUT_EFFECT = {
    "cu_seq_lens_k", "max_length_k", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
}  # fmt: skip
"""Keywords that change nothing here: the boundaries once more, positions that rotate queries elsewhere, and what a model
returns."""
_MAX_FLASH_HEAD_DIM = 256
_MAX_CUDNN_HEAD_DIM = 128
_CUDNN_LENGTH_STEP = 256
"""cuDNN makes a plan for each new length, which takes about 0.1 s: a single sequence is padded to a multiple of this."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sequence_lengths: tuple[int, ...] = (),
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed sequence; local heads only, no collective.

    ``query`` [1, q_heads_local, T, d], ``key`` [1, kv_heads_local, T, d] and ``value`` [1, kv_heads_local, T, v] in one
    dtype; the head sizes d and v differ in latent attention. ``cu_seq_lens_q`` int32 [S + 1] and ``sequence_lengths`` say
    the same, on the device and (so that nothing waits for it) on the host. A token sees itself and the
    ``sliding_window - 1`` tokens before it (all before it without a window). ``s_aux`` [q_heads_local] are attention sinks,
    by transformers' name for them.
    Returns [1, T, q_heads_local, v], contiguous, in that dtype, and None for the scores. Raises UnsupportedModelError for a
    mask and for ``others`` that would have an effect, BoundariesMissingError without boundaries.
    """
    if cu_seq_lens_q is None:
        raise BoundariesMissingError(type(module))
    refuse_what_would_be_dropped(module, attention_mask, others)
    width = value.shape[-1]
    widest = max(query.shape[-1], width)
    if query.is_cuda and query.dtype != torch.float32 and softcap is None and widest <= _MAX_FLASH_HEAD_DIM:
        query, key, value, scaling = of_one_width(query, key, value, scaling)
        if s_aux is None and _takes_cudnn(query, cu_seq_lens_q, sliding_window):
            return _one_padded_sequence(query, key, value, scaling)[..., :width].contiguous(), None
        heads = query[0], key[0], value[0]
        out = _flash(*heads, s_aux, cu_seq_lens_q, max_length_q, scaling, sliding_window)
        return out[None, ..., :width].contiguous(), None
    parts = [
        _one_sequence(q, k, v, scaling, sliding_window, softcap, s_aux)
        for q, k, v in zip(*(t[0].split(sequence_lengths, dim=1) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)[None].contiguous(), None


def refuse_what_would_be_dropped(module: nn.Module, mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if the layer ``module`` gives its attention a ``mask``, or a keyword that is not known
    here (``position_bias`` is in use) with a value other than None."""
    found = [] if mask is None else ["a mask of its own"]
    for name, value in others.items():
        harmless = name in _WITHOUT_EFFECT or value is None
        harmless = harmless or (name == "dropout" and value == 0.0) or (name == "is_causal" and value is True)
        if not harmless:
            found.append(f"{name}={value}" if isinstance(value, bool | int | float | str) else name)
    if found:
        raise UnsupportedModelError(
            f"{type(module).__name__}: got {', '.join(found)} for its attention, expected causal attention with at most a "
            "window, a scale, a soft cap and sinks, which is all that packed sequences have here; serve another model"
        )


def of_one_width(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Queries, keys and values [..., d], [..., d] and [..., v] as kernels with one head size take them, and the scale:
    zeros are added up to the larger size, which change no score, and no result before column v."""
    size, width = query.shape[-1], value.shape[-1]
    if size == width:
        return query, key, value, scale
    query, key = (F.pad(t, (0, max(0, width - size))) for t in (query, key))
    return query, key, F.pad(value, (0, max(0, size - width))), size**-0.5 if scale is None else scale


def _takes_cudnn(query: Tensor, cu_seqlens: Tensor, window: int | None) -> bool:
    """True for a single sequence without a window, on a device where cuDNN's kernels are faster than FlashAttention 2."""
    windowed = window is not None and query.shape[2] > window
    narrow = query.shape[-1] <= _MAX_CUDNN_HEAD_DIM
    return cu_seqlens.shape[0] == 2 and narrow and not windowed and cudnn_is_faster()


def cudnn_is_faster() -> bool:
    """True on this device if it is Hopper or later. A constant to compiled code, see compile_layers."""
    return torch.cuda.get_device_capability() >= (9, 0)


def _one_padded_sequence(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of one sequence, local: [1, heads, T, d] to [1, T, q_heads, d].

    What follows a token does not reach it, so padding after the last one changes nothing and has no gradient.
    """
    length = query.shape[2]
    padding = -length % _CUDNN_LENGTH_STEP
    query, key, value = (F.pad(t, (0, 0, 0, padding)) for t in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out[:, :, :length].transpose(1, 2)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of all sequences through FlashAttention, local: [heads, T, d] to [T, q_heads, d]."""
    query, key, value = (t.transpose(0, 1).contiguous() for t in (query, key, value))
    if sinks is not None:
        return FlashWithSinks.apply(query, key, value, sinks, cu_seqlens, longest, scale, window)  # type: ignore[no-any-return]
    return varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": True} if _VARLEN_NAMES_GQA and query.shape[1] != key.shape[1] else {}),
    )


def _one_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of one sequence of t tokens, local: [heads, t, d] to [q_heads, t, d]."""
    length = query.shape[1]
    windowed, plain = window is not None and length > window, softcap is None and sinks is None
    if plain and not windowed:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    if windowed:
        visible &= ~torch.ones_like(visible).tril_(-window)  # type: ignore[operator]
    if plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    groups = query.shape[0] // key.shape[0]
    key, value = (t.repeat_interleave(groups, dim=0) for t in (key, value))
    scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, length, 1)], dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :length].to(query.dtype) @ value


AttentionInterface.register(NAME, packed_attention)
