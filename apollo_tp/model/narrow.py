"""Build the Hugging Face model of a checkpoint at one rank's width, without memory for its parameters."""

from __future__ import annotations

import copy

import accelerate
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model import attention

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

    Dropout is switched off. Raises UnsupportedModelError if a width does not divide by ``tp_size``.
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
        if ("dropout" in name or "pdrop" in name or name == "router_jitter_noise") and isinstance(value, float):
            setattr(narrow, name, 0.0)
    narrow.use_cache = False
    return narrow


def build_on_meta(config: PretrainedConfig, tp_size: int, dtype: torch.dtype, *, tied: bool) -> PreTrainedModel:
    """The causal language model of ``config`` at this width: parameters on meta, buffers real and on the CPU.

    ``tied`` says whether the head shares the embedding's weight. Raises UnsupportedModelError for a config without one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type}: got an encoder-decoder model, expected a decoder-only one")
    narrow = narrow_config(config, tp_size)
    narrow.tie_word_embeddings = tied
    # no_init_weights: without it every linear layer would be filled with random numbers before it is thrown away.
    try:
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(narrow, dtype=dtype, attn_implementation=attention.NAME)
    except ValueError as error:  # no such class, or one without exchangeable attention
        raise UnsupportedModelError(f"{config.model_type}: {error}") from error
    return module.train()
