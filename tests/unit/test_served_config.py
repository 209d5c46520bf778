"""The trainer computes by the config that the server computes by, and its checkpoints keep the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.narrow import build_on_meta
from apollo_tp.model.served_config import as_served
from tests.unit.families import FAMILIES

SHORT, LONG = [1.0] * 8, [float(2 + i) for i in range(8)]


def _frequencies(config: PretrainedConfig, length: int) -> torch.Tensor:
    """What the model multiplies positions by in a sequence of ``length`` tokens."""
    rotary = build_on_meta(config, 1, torch.float32, tied=False).model.rotary_emb
    rotary(torch.zeros(1, length, 4), torch.arange(length)[None])
    return rotary.inv_freq.clone()


def test_overrides_reach_the_model_and_not_the_original() -> None:
    """Positions that vLLM was told to stretch."""
    config = FAMILIES["qwen3"].config()
    own = config.to_dict()
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 8.0, "rope_theta": config.rope_parameters["rope_theta"]}
    served = as_served(config, {"rope_parameters": rope}, 0)
    torch.testing.assert_close(_frequencies(served, 8) * 8, _frequencies(config, 8))
    assert config.to_dict() == own


def test_longrope_is_chosen_by_what_the_server_can_serve() -> None:
    """vLLM has one set of frequencies for all lengths (the prefix cache must hold); transformers chooses by the batch."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG,
        "original_max_position_embeddings": 64, "factor": 4.0,
    }  # fmt: skip
    config = FAMILIES["phi3"].config(
        rope_parameters=rope, max_position_embeddings=256, original_max_position_embeddings=64,
        head_dim=16, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    short, long = _frequencies(config, 32), _frequencies(config, 128)
    assert not torch.equal(short, long)
    assert torch.equal(_frequencies(as_served(config, {}, 64), 32), short)
    assert torch.equal(_frequencies(as_served(config, {}, 256), 32), long)
    assert torch.equal(_frequencies(as_served(config, {}, 256), 128), long)


def test_what_the_two_compute_differently_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="rope_type dynamic"):
        as_served(FAMILIES["llama"].config(rope_parameters=rope), {}, 0)
