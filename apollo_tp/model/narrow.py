"""Build the Hugging Face model of a checkpoint at one rank's width, without memory for its parameters."""

from __future__ import annotations

import copy

import accelerate
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model import attention
from apollo_tp.model.refusal import refusing

# Config fields that count what vLLM divides over TP ranks.
_DIVIDED = (
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def narrow_config(config: PretrainedConfig, tp_size: int) -> PretrainedConfig:
    """A copy of the text config at 1 / ``tp_size`` of its width; at least one KV head, head size and vocabulary as is.

    Dropout is switched off: gradient checkpointing needs layers in training mode. Raises UnsupportedModelError if a width
    does not divide by ``tp_size``.
    """
    narrow = copy.deepcopy(config.get_text_config())
    # The head size of some families is hidden_size / heads unless it is given: give it before the heads change.
    if getattr(narrow, "head_dim", None) is None:
        narrow.head_dim = narrow.hidden_size // narrow.num_attention_heads
    for name in _DIVIDED:
        width = getattr(narrow, name, None)
        if width is None:
            continue
        if not isinstance(width, int) or width % tp_size:
            raise UnsupportedModelError(
                f"{name}: got {width}, expected a multiple of the tensor-parallel size {tp_size}; serve at a smaller one"
            )
        setattr(narrow, name, width // tp_size)
    if getattr(narrow, "num_key_value_heads", None) is not None:
        narrow.num_key_value_heads = max(1, narrow.num_key_value_heads // tp_size)
    for name, value in narrow.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(narrow, name, 0.0)
    narrow.use_cache = False
    return narrow


def build_on_meta(config: PretrainedConfig, tp_size: int, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of ``config`` at this width: parameters on meta, buffers real and on the CPU, in
    evaluation mode: dropout and noise in routers would be random, and the server computes without them. The head has a
    weight of its own, tied or not. Raises UnsupportedModelError for a config of another kind of model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type}: got an encoder-decoder model, expected a decoder-only one")
    # no_init_weights: without it every linear layer would be filled with random numbers before it is thrown away.
    with (
        refusing(f"{config.model_type} at 1 / {tp_size} of its width"),
        no_init_weights(),
        accelerate.init_empty_weights(include_buffers=False),
    ):
        narrow = narrow_config(config, tp_size)
        narrow.tie_word_embeddings = False
        module = AutoModelForCausalLM.from_config(narrow, dtype=dtype, attn_implementation=attention.NAME)
    return module.eval()
