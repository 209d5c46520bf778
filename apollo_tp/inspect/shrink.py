"""A small copy of a model's config: the same architecture and options, few layers of each kind, narrow, with few experts.

Only sizes change. What a layer does stays as it is: biases, norms, soft caps, multipliers, kinds of layers, ties. Windows
are cut to fewer tokens than a trial has, so that they matter.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from apollo_tp.errors import UnsupportedModelError

HEADS, HEAD_DIM, VOCABULARY, WINDOW = 4, 16, 1003, 8
_MAX_LAYERS = 6
_WIDTHS = {
    "intermediate_size": 96, "ffn_dim": 96, "intermediate_size_mlp": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "hidden_size_per_layer_input": 16,
    "q_lora_rank": 32, "kv_lora_rank": 32, "linear_key_head_dim": HEAD_DIM, "linear_value_head_dim": HEAD_DIM,
    "max_position_embeddings": 256, "sliding_window": WINDOW, "attention_chunk_size": WINDOW,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "max_window_layers": 1, "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
"""Fields that are cut to at most this, where a config has them."""
_TOWER = {"num_hidden_layers": 1, "depth": 1, "num_layers": 1}
_SPECIAL = (
    "image_token",
    "video_token",
    "vision_start_token",
    "vision_end_token",
    "boi_token",
    "eoi_token",
    "audio_token",
)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a copy with some 100,000 parameters, of ``config``'s own class; runs at tensor-parallel sizes 1, 2, 4.

    Raises UnsupportedModelError if its class refuses such sizes.
    """
    fields = copy.deepcopy(config.to_dict())
    text = fields.get("text_config") if isinstance(fields.get("text_config"), dict) else fields
    assert text is not None
    try:
        _shrink_text(text)
        for name, part in fields.items():
            if name.endswith("_config") and name != "text_config" and isinstance(part, dict):
                part.update({key: 1 for key in _TOWER if isinstance(part.get(key), int)})
                if "out_hidden_size" in part:
                    part["out_hidden_size"] = text["hidden_size"]
        _move_tokens(fields)
        small = type(config).from_dict(fields)
    except Exception as error:
        raise UnsupportedModelError(
            f"{config.model_type}: got {type(error).__name__}: {error} for a copy with small sizes, expected a config whose "
            "sizes are those of apollo_tp.inspect.shrink; it cannot be tried"
        ) from error
    small.architectures = config.architectures
    return small


def _shrink_text(text: dict[str, Any]) -> None:
    """In place: the fields of a language model."""
    heads, kv = text.get("num_attention_heads") or HEADS, text.get("num_key_value_heads")
    head_dim = text.get("head_dim")
    text["num_attention_heads"] = HEADS
    if kv is not None:
        text["num_key_value_heads"] = HEADS if kv == heads else 1 if kv == 1 else 2
    if head_dim is not None:
        text["head_dim"] = min(head_dim, 2 * HEAD_DIM)
    text["hidden_size"] = HEADS * HEAD_DIM
    if "linear_num_key_heads" in text:
        ratio = max(1, text["linear_num_value_heads"] // text["linear_num_key_heads"])
        text |= {"linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS * min(ratio, 2)}
    for name, size in _WIDTHS.items():
        if isinstance(text.get(name), int) and not isinstance(text[name], bool) and text[name] > size:
            text[name] = size
    if isinstance(text.get("rotary_dim"), int):
        text["rotary_dim"] = min(text["rotary_dim"], text.get("head_dim") or HEAD_DIM)
    text["initializer_range"] = 0.1  # larger than usual, so that every tensor matters to the loss of so small a model
    _keep_kinds_of_layers(text)
    _shrink_rope(text)


def _keep_kinds_of_layers(text: dict[str, Any]) -> None:
    """In place: at least two layers, and one of each kind by the lists that have an entry for each layer."""
    count = text["num_hidden_layers"]
    lists = {name: value for name, value in text.items() if isinstance(value, list) and len(value) == count > 2}
    kept: dict[str, int] = {}
    for layer in range(count):
        kept.setdefault(repr([value[layer] for value in lists.values()]), layer)
    layers = sorted(kept.values())[:_MAX_LAYERS]
    while len(layers) < min(2, count):
        layers.append(next(layer for layer in range(count) if layer not in layers))
    layers.sort()
    text["num_hidden_layers"] = len(layers)
    for name, value in lists.items():
        text[name] = [value[layer] for layer in layers]
    for name in ("mlp_only_layers", "full_attn_idxs"):
        if isinstance(text.get(name), list):
            text[name] = [i for i, layer in enumerate(layers) if layer in text[name]]


def _shrink_rope(text: dict[str, Any]) -> None:
    """In place: the original length of stretched positions, and LongRoPE's lists, one factor for each pair of a head."""
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    by_kind = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    pairs = int((text.get("head_dim") or HEAD_DIM) * (rope.get("partial_rotary_factor") or 1.0)) // 2
    for part in by_kind:
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = 64
        for name in ("short_factor", "long_factor"):
            if isinstance(part.get(name), list):
                part[name] = part[name][:pairs]
    if text.get("original_max_position_embeddings"):
        text["original_max_position_embeddings"] = 64


def _move_tokens(fields: dict[str, Any], count: int = 0) -> int:
    """In place, in all parts: token ids of the whole vocabulary to places in the small one. Returns how many had one of
    their own."""
    for name, value in fields.items():
        if isinstance(value, dict):
            count = _move_tokens(value, count)
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
            first = value[0] if isinstance(value, list) else value
            fields[name] = first if 0 <= first < VOCABULARY else ids[name]
        elif str(name).startswith(_SPECIAL) and isinstance(value, int):
            count += 1
            fields[name] = VOCABULARY - count
    return count
