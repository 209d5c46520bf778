"""The config by which the server computes, where that is not what the model's folder says."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from apollo_tp.errors import UnsupportedModelError


def as_served(config: PretrainedConfig, overrides: dict[str, Any], max_model_len: int) -> PretrainedConfig:
    """A copy of ``config`` with ``overrides`` (vLLM's --hf-overrides), and rotary frequencies as vLLM has them for
    ``max_model_len`` tokens (0: unknown).

    Raises UnsupportedModelError for rotary embeddings that transformers and vLLM compute differently at the same length.
    """
    served = copy.deepcopy(config)
    for name, value in overrides.items():
        setattr(served, name, value)
    text = served.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "dynamic":
        raise UnsupportedModelError(
            "rope_type dynamic: got frequencies that vLLM scales at any length and transformers only beyond the original "
            "one, expected a type that both compute alike; override it with another (--hf-overrides) or serve another model"
        )
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    # LongRoPE: transformers chooses by each batch's length, vLLM once, by the longest that it serves
    if kind == "longrope" and original and max_model_len > original:
        text.rope_parameters = rope | {"short_factor": rope["long_factor"]}
    return served
