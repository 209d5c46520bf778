"""The trainer computes by the config that the server computes by, and its checkpoints keep the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.build import as_served, build_on_meta
from tests.support.families import FAMILIES, Family

SHORT, LONG = [1.0] * 8, [float(2 + i) for i in range(8)]


def _frequencies(config: PretrainedConfig, length: int) -> torch.Tensor:
    """What the model multiplies positions by in a sequence of ``length`` tokens."""
    rotary = build_on_meta(config, 1, torch.float32).model.rotary_emb
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


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"hidden_act": "gelu", "hidden_activation": None}, "tanh"),
        ({"hidden_act": "gelu"}, "tanh"),
        ({"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}, "none"),
    ],
)
def test_gemmas_first_configs_say_gelu_and_mean_its_tanh_form(fields: dict[str, Any], form: str) -> None:
    """vLLM takes hidden_activation, and the tanh form without one; transformers takes hidden_act."""
    config = Family("gemma", {"head_dim": 32, "pad_token_id": 0}).config(**fields)
    served = build_on_meta(as_served(config, {}, 0), 1, torch.float32).model.layers[0].mlp.act_fn
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(served(x), torch.nn.functional.gelu(x, approximate=form))


def test_ministral_3_is_refused_beyond_the_length_where_queries_are_scaled_by_transformers_alone() -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    config = Family("ministral3", {"head_dim": 16, "rope_parameters": rope}).config(max_position_embeddings=1024)
    assert as_served(config, {}, 64).to_dict() == config.to_dict()
    with pytest.raises(UnsupportedModelError, match=r"llama_4_scaling_beta 0.1: got max_model_len 65, .* 64"):
        as_served(config, {}, 65)
    as_served(
        config, {"llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.1}}, 65
    )  # as vLLM reads it


def test_what_the_two_compute_differently_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="rope_type dynamic"):
        as_served(FAMILIES["llama"].config(rope_parameters=rope), {}, 0)
