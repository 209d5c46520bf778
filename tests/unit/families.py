"""Tiny random models of every supported family: the table that the exactness suites run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 1003  # no multiple of 64: vLLM pads it to 1024, so the last of 4 ranks holds 235 rows

_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.1,  # larger than usual, so that every tensor matters to the loss of so small a model
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A tiny model: ``fields`` over the common dense ones; ``tolerance`` is the relative error per gradient in fp32."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    def config(self, **changes: Any) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, **{**_DENSE, **self.fields, **changes})


FAMILIES = {
    "qwen3": Family("qwen3", {"head_dim": 32}),
    "qwen3-tied": Family("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": Family("llama"),
    "llama3-rope": Family(
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": Family("qwen2"),
}


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The single-process reference in fp32 with eager attention and random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at 1 and 0, which would hide a wrong shard
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
