"""Rotary embeddings that this vLLM computes differently from transformers, whose model is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

SCALED_ROTARY_CLASSES = ("YaRNScalingRotaryEmbedding", "MRotaryEmbedding")
"""Class names of vLLM's modules that scale cosines and sines by ``mscale``."""


def yarn_refusals(model: nn.Module, config: Any) -> list[str]:
    """How vLLM's scale of queries and keys in YaRN differs from that of transformers; empty if it does not."""
    # vLLM release 0.26: the scale follows from ``factor`` alone, and from fields that only vLLM knows. 0.32 agrees with
    # transformers.
    expected, found = [_scale(rope) for rope in _yarn_settings(config)], set()
    if not expected:
        return []
    for module in model.modules():
        if type(module).__name__ not in SCALED_ROTARY_CLASSES or getattr(module, "scaling_factor", None) is None:
            continue
        if not any(math.isclose(module.mscale, scale, rel_tol=1e-6) for scale in expected):
            found.add(f"scales by {module.mscale:.4g}, transformers by {' or '.join(f'{s:.4g}' for s in expected)}")
        if getattr(module, "extrapolation_factor", 1) != 1:
            found.add("has an extrapolation_factor, transformers none")
    return [f"YaRN: this vLLM {difference}; use a release that agrees (0.32)" for difference in sorted(found)]


def _yarn_settings(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of type yarn in ``rope_parameters``; some models have settings for each kind of layer."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or {}
    yield from (each for each in [rope, *rope.values()] if isinstance(each, dict) and each.get("rope_type") == "yarn")


def _scale(rope: dict[str, Any]) -> float:
    """The factor of cosines and sines as transformers computes it (modeling_rope_utils); Peng et al. 2023, eq. 22."""

    def scale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    given, mscale, mscale_all_dim = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale()
