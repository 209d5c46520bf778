"""Rotary embeddings whose scale differs between vLLM and transformers are refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apollo_tp.vllm_plugin.compat.refusals import yarn_refusals

L4 = math.log(4)


class YaRNScalingRotaryEmbedding(nn.Module):
    """vLLM 0.26's, as far as its scale goes."""

    def __init__(self, scaling_factor: float, attn_factor: float = 1.0, extrapolation_factor: float = 1.0) -> None:
        super().__init__()
        self.scaling_factor, self.extrapolation_factor = scaling_factor, extrapolation_factor
        self.mscale = (0.1 * math.log(scaling_factor) + 1.0) * attn_factor


@pytest.mark.parametrize(
    ("fields", "options", "refused"),
    [
        ({}, {}, ""),
        ({"attention_factor": 0.1 * math.log(4) + 1.0}, {}, ""),
        ({"attention_factor": 1.0}, {}, "scales by 1.139, transformers by 1"),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {}, "scales by 1.139, transformers by 1"),
        ({"mscale": 1.0}, {}, ""),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, {}, "scales by 1.139, transformers by 1.122"),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, {}, "scales by 1.139, transformers by 0.9643"),
        # what a release that knows both fields scales by
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, {"attn_factor": (0.2 * L4 + 1) / (0.1 * L4 + 1) ** 2}, ""),
        ({}, {"attn_factor": 2.0}, "scales by 2.277, transformers by 1.139"),
        ({}, {"extrapolation_factor": 2.0}, "extrapolation_factor"),
    ],
)
def test_a_yarn_that_vllm_scales_otherwise_is_refused(
    fields: dict[str, Any], options: dict[str, Any], refused: str
) -> None:
    """vLLM 0.26 takes ``factor`` alone, and fields of its own; expected is what transformers itself computes."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64} | fields
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    module = YaRNScalingRotaryEmbedding(4.0, **options)
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    found = yarn_refusals(nn.ModuleList([module, nn.Linear(1, 1)]), config)
    assert refused in found[0] if refused else found == [], found
    assert (module.mscale == pytest.approx(scale)) == ("scales by" not in refused)
    nested = SimpleNamespace(rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default"}})
    assert yarn_refusals(module, nested) == found
    assert yarn_refusals(module, SimpleNamespace()) == [], "unknown to transformers: not compared"
