"""The Hugging Face model that a rank trains: the config as the server sees it, at one rank's width, without memory yet."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from apollo_tp.errors import ApolloTpError, ConfigError, UnsupportedModelError
from apollo_tp.model import attention, towers

_DIVIDED_FIELDS = (
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Fields of a config that count what vLLM divides over the tensor-parallel ranks."""

_NOT_THE_MODELS = (ApolloTpError, torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError)
"""Errors that say nothing about the model: a full or broken device, a lost rank, and apollo_tp's own errors."""


@contextlib.contextmanager
def refusing(subject: str) -> Iterator[None]:
    """Turn whatever the model's own code raises in this block into an UnsupportedModelError about ``subject``."""
    try:
        yield
    except _NOT_THE_MODELS:
        raise
    except Exception as error:  # a missing field, another signature, a plain ValueError: each family has its own way
        raise UnsupportedModelError(
            f"{subject}: got {type(error).__name__}: {error}; expected a decoder-only model that transformers builds and "
            "runs with exchangeable attention; use one of the families in docs/models.md"
        ) from error


def read_model_config(model_path: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config in the model's folder. Raises ConfigError if it needs code of its own, which ``trust_remote_code`` does not
    allow, and UnsupportedModelError if it cannot be read."""
    with refusing(model_path):
        try:
            return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise ConfigError(
                f"model.trust_remote_code: got false and {model_path}, whose config.json names Python code of its own "
                "(auto_map), expected true for such a model; each rank then runs that code, so read it first"
            ) from error


def as_served(config: PretrainedConfig, overrides: dict[str, Any], max_model_len: int) -> PretrainedConfig:
    """The config by which the server computes: a copy of the folder's ``config`` with ``overrides`` (vLLM's --hf-overrides),
    and rotary frequencies as vLLM has them for ``max_model_len`` tokens (0: unknown).

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


def narrow_config(config: PretrainedConfig, tp_size: int) -> PretrainedConfig:
    """A copy of the config whose text part has 1 / ``tp_size`` of its width; at least one KV head, head size and vocabulary
    as is.

    Dropout is switched off: gradient checkpointing needs layers in training mode. Raises UnsupportedModelError if a width
    does not divide by ``tp_size``.
    """
    whole = copy.deepcopy(config)
    narrow = whole.get_text_config()
    # The head size of some families is hidden_size / heads unless it is set: set it before the number of heads changes.
    if getattr(narrow, "head_dim", None) is None:
        narrow.head_dim = narrow.hidden_size // narrow.num_attention_heads
    for name in _DIVIDED_FIELDS:
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
    whole.tie_word_embeddings = narrow.tie_word_embeddings = False
    return whole


def build_on_meta(
    config: PretrainedConfig, tp_size: int, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of ``config`` at this width: parameters on meta, buffers real and on the CPU, in
    evaluation mode: dropout and noise in routers would be random, and the server computes without them. The head has a
    weight of its own, tied or not. What belongs to images is left out (``towers``). Raises UnsupportedModelError for a
    config of another kind of model.
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

        def build(of: PretrainedConfig) -> PreTrainedModel:
            # given, never None: transformers would ask on standard input
            module: PreTrainedModel = towers.auto_class(of).from_config(
                of, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=trust_remote_code
            )
            towers.leave_out(module)
            return module

        module = build(narrow)
        head_size = narrow.get_text_config().head_dim
        if any(_head_size(child) not in (None, head_size) for child in module.modules()):
            module = _with_whole_heads(build, narrow, config.get_text_config())
    return module.eval()


def _head_size(module: nn.Module) -> int | None:
    """That of an attention module, as it has computed it; None of another module."""
    size = getattr(module, "head_dim", getattr(module, "head_size", None))
    return size if isinstance(size, int) and hasattr(module, "is_causal") else None


def _with_whole_heads(
    build: Callable[[PretrainedConfig], PreTrainedModel], narrow: PretrainedConfig, whole: PretrainedConfig
) -> PreTrainedModel:
    """The module of ``narrow`` with attention as wide as that of ``whole``, whose head size is hidden_size / heads and would
    be larger with fewer heads (StableLM, GPT-NeoX). It counts this rank's heads, and is ``whole_heads``: its parameters
    have their global shapes, of which a rank has a part."""
    heads, kv = (getattr(narrow.get_text_config(), f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    counts = {"num_attention_heads": heads, "num_heads": heads}
    wide = copy.deepcopy(narrow)
    wide.get_text_config().num_attention_heads = whole.num_attention_heads
    if kv is not None:
        wide.get_text_config().num_key_value_heads, counts["num_key_value_heads"] = whole.num_key_value_heads, kv
        counts["num_key_value_groups"] = heads // kv
    module = build(wide)
    for child in module.modules():
        if _head_size(child) is not None:
            for name in counts.keys() & vars(child).keys():
                setattr(child, name, counts[name])
            child.whole_heads = True  # type: ignore[assignment]
    text = module.config.get_text_config()
    text.num_attention_heads = heads
    if kv is not None:
        text.num_key_value_heads = kv
    return module


def has_whole_heads(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` is that of attention with ``_with_whole_heads``."""
    owner = name
    while owner := owner.rpartition(".")[0]:
        if getattr(module.get_submodule(owner), "whole_heads", False):
            return True
    return False
