"""The config by which the server computes, where that is not what the model's folder says."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from apollo_tp.errors import UnsupportedModelError


def as_served(config: PretrainedConfig, overrides: dict[str, Any], max_model_len: int) -> PretrainedConfig:
    """A copy of ``config`` with ``overrides`` (vLLM's --hf-overrides), and rotary frequencies as vLLM has them for
    ``max_model_len`` tokens (0: unknown).

    Raises UnsupportedModelError for rotary embeddings and query scales that transformers and vLLM compute differently at the
    same length.
    """
    served = copy.deepcopy(config)
    for name, value in overrides.items():
        setattr(served, name, value)
    text = served.get_text_config()
    # Gemma's first configs say "gelu" and mean its tanh form: vLLM knows, transformers 5 takes them at their word
    if text.model_type == "gemma":
        text.hidden_act = getattr(text, "hidden_activation", None) or "gelu_pytorch_tanh"
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
    # Ministral 3: transformers scales queries by their position, vLLM by a field that this config does not have
    beta = rope.get("llama_4_scaling_beta")
    if beta and getattr(text, "llama_4_scaling", None) is None and original and max_model_len > original:
        raise UnsupportedModelError(
            f"llama_4_scaling_beta {beta}: got max_model_len {max_model_len}, expected at most {original}, beyond which "
            f"transformers scales queries and vLLM does not; serve with --max-model-len {original}"
        )
    return served
