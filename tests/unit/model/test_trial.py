"""What a layer asks of its attention is honoured or refused when the model is bound: masks, windows and keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model import bind_model
from apollo_tp.model.attention import packed_attention
from apollo_tp.model.trial import _difference
from tests.support.families import FAMILIES, Family, build
from tests.support.whole_shards import whole_shards

WHOLE = TPGroup.single()
_EXPERTS = {"num_local_experts": 4, "lm_head_bias": False}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_HIDDEN = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

REFUSED = {
    "a window that is only in the mask": (Family("phimoe", _EXPERTS | {"sliding_window": 8}), "its mask has a window"),
    "a window in one layer's mask": (Family("qwen2_moe", _QWEN | _HIDDEN), r"so:\n  model.layers.1.self_attn [^\n]*$"),
    "a mask of its own": (Family("doge", {"keep_window_size": 64}), "DogeAttention: got a mask of its own"),
    "a window that nothing uses": (Family("llama", {"sliding_window": 8}), "the config has a window of 8 tokens"),
    "a recurrence that runs on": (
        Family("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention"] * 2}),
        "hidden states that depend on the sequence before",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_packed_attention_would_drop_is_refused(case: str) -> None:
    """Each of these was trained with gradients of another function than the model's: nothing raised."""
    family, message = REFUSED[case]
    config = (
        family.config(layer_types=["full_attention", "sliding_attention"]) if "one layer" in case else family.config()
    )
    with pytest.raises(UnsupportedModelError, match=message):
        bind_model(config, whole_shards(build(config)), WHOLE)


@pytest.mark.parametrize(
    "keyword",
    [
        {"position_bias": torch.zeros(4)},
        {"position_bias": 1.0},
        {"anything": "new"},
        {"dropout": 0.1},
        {"is_causal": False},
    ],
)
def test_a_keyword_that_attention_does_not_know_is_refused(keyword: dict[str, Any]) -> None:
    """Whatever its name, with its name; without a value it is accepted, as are those without an effect."""
    states = torch.ones(1, 4, 3, 16)
    packing = {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3, "sequence_lengths": (3,)}
    harmless = {"position_ids": torch.arange(3), "use_cache": False, "dropout": 0.0, "is_causal": True, "s_aux": None}
    packed_attention(nn.Identity(), states, states, states, None, **packing, **harmless)
    with pytest.raises(UnsupportedModelError, match=f"Identity: got {next(iter(keyword))}.* for its attention"):
        packed_attention(nn.Identity(), states, states, states, None, **packing, **(harmless | keyword))


def _full(module: nn.Module, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """A layer that mixes all tokens without asking for attention."""
    return hidden_states.mean(1, keepdim=True).expand_as(hidden_states), None


def _backwards(module: nn.Module, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """A layer in which each token gets something of its sequence's next one."""
    sequences = hidden_states.split(kwargs["sequence_lengths"], dim=1)
    return torch.cat([torch.cat([s[:, 1:], 0 * s[:, :1]], dim=1) for s in sequences], dim=1), None


@pytest.mark.parametrize(
    ("forward", "message"), [(_full, "depend on the sequence before"), (_backwards, "depend on later tokens")]
)
def test_a_layer_that_is_no_attention_is_tried_too(
    monkeypatch: pytest.MonkeyPatch, forward: Callable[..., Any], message: str
) -> None:
    """By what reaches the hidden states of a token, whatever the layer is called."""
    config = FAMILIES["llama"].config()
    shards = whole_shards(build(config))
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=message):
        bind_model(config, shards, WHOLE)


def _window(size: int) -> Callable[..., Any]:
    return masking_utils.sliding_window_causal_mask_function(size)


@pytest.mark.parametrize(
    ("mask", "window", "difference"),
    [
        (masking_utils.causal_mask_function, None, None),
        (_window(7), 7, None),
        (_window(7), None, "its mask has a window"),
        (_window(8), 7, "a token sees another one 7 before it"),
        (_window(6), 7, "a token does not see another one 6 before it"),
        (masking_utils.causal_mask_function, 7, "a token sees another one 1048576 before it"),
        (masking_utils.bidirectional_mask_function, None, "a token sees another one -1 before it"),
        (
            masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
            4,
            "does not see another one 1",
        ),
        (lambda b, h, q, k: torch.ones(5)[k] > 0, None, "depends on which tokens there are"),
        (None, None, "it changes the mask"),
    ],
)
def test_a_mask_is_compared_with_what_the_layer_said(
    mask: Callable[..., Any] | None, window: int | None, difference: str | None
) -> None:
    """transformers' own masks, on both sides of the window; also one that is not shorter than any trial."""
    found = _difference(mask, window, without=False)
    assert (found is None) == (difference is None), found
    assert difference is None or difference in str(found)
    assert _difference(None, None, without=True) is not None
