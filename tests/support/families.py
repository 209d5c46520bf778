"""Tiny random models of every supported family: the table that the exactness suites run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from apollo_tp.inspect.copy_trial import build as build  # the reference of the suite, and of --try

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

_GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
_GDN: dict[str, Any] = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
_COHERE: dict[str, Any] = {"logit_scale": 0.25, "tie_word_embeddings": True, "pad_token_id": 0}
_GEMMA3 = _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}
_QWEN_VISION: dict[str, Any] = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    },
    "vision_start_token_id": 998,
    "vision_end_token_id": 999,
    "image_token_id": 1000,
    "video_token_id": 1001,
    "tie_word_embeddings": False,
}
_GEMMA_VISION: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 998,
    "eoi_token_index": 999,
    "image_token_index": 1000,
}
_IMAGE_TOKENS: dict[str, Any] = {
    "vision_start_token_id": 998,
    "vision_end_token_id": 999,
    "image_token_id": 1000,
    "video_token_id": 1001,
    "tie_word_embeddings": False,
}
_SMALL_TOWER: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64, "patch_size": 4,
}  # fmt: skip


def _multi_rope(*sections: int) -> dict[str, Any]:
    """Positions in time, height and width, all the same in text; ``sections``: pairs of a head for each."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    rope["partial_rotary_factor"] = sum(sections) / 8
    return {"head_dim": 16, "rope_parameters": rope}


GDN_TOLERANCE = 1e-4  # the chunked recurrence multiplies many exponentials; a shard's sums run in another order


@dataclass(frozen=True)
class Family:
    """A tiny model: ``fields`` over the common dense ones; ``tolerance`` is the relative error per gradient in fp32."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    wrapper: dict[str, Any] = field(default_factory=dict)
    """Fields of the config around ``text_config`` for models with a vision tower, which is not trained."""

    def config(self, **changes: Any) -> PretrainedConfig:
        text = {**_DENSE, **self.fields, **changes}
        if self.wrapper:
            return AutoConfig.for_model(
                self.model_type, text_config=text, initializer_range=text["initializer_range"], **self.wrapper
            )
        return AutoConfig.for_model(self.model_type, **text)


_GLM_MOE: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
_GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2}


def _deepseek_yarn(**scales: float) -> dict[str, Any]:
    """Stretched positions, which scale the softmax as well."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
    return {"rope_parameters": rope | {"original_max_position_embeddings": 64, **scales}}


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
    "mistral-window": Family("mistral", {"sliding_window": 8, "head_dim": 16}),
    "gemma2": Family("gemma2", _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": Family("gemma3_text", _GEMMA3),
    "phi3": Family("phi3", {"num_key_value_heads": 2}),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo-clipped": Family("olmo", {"clip_qkv": 0.5}),
    "granite": Family(
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "qwen3-moe": Family("qwen3_moe", _MOE | {"moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16}),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    # as many KV heads as ranks: vLLM's own norm over all heads counts replicas twice
    "olmoe": Family("olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-next": Family("qwen3_next", _GDN | _MOE | {"moe_intermediate_size": 32}, GDN_TOLERANCE),
    "qwen3.5": Family("qwen3_5_text", _GDN, GDN_TOLERANCE),
    "qwen3.5-vision": Family("qwen3_5", _GDN, GDN_TOLERANCE, _QWEN_VISION),
    "qwen3.5-moe": Family("qwen3_5_moe_text", _GDN | _MOE | {"moe_intermediate_size": 32}, GDN_TOLERANCE),
    # as many KV heads as ranks: vLLM cuts its key norm, a weight for each head, no further
    "cohere": Family("cohere", _COHERE | {"use_qk_norm": True, "num_key_value_heads": 4}),
    "cohere2": Family(
        "cohere2", _COHERE | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "gpt-neox": Family("gpt_neox", {"attention_bias": True}),
    "nemotron": Family("nemotron"),
    "stablelm": Family("stablelm", {"use_qkv_bias": True}),
    "glm4-moe": Family("glm4_moe", _GLM_MOE | {"head_dim": 16, "use_qk_norm": True}),
    "dots1": Family("dots1", _GLM_MOE),
    "deepseek-v2": Family(
        "deepseek_v2",
        _GLM_MOE
        | _LATENT
        | _GROUPS
        | _deepseek_yarn(mscale=0.707, mscale_all_dim=0.707)
        | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    ),
    "deepseek-v3": Family(
        "deepseek_v3",
        _GLM_MOE
        | _LATENT
        | _GROUPS
        | _deepseek_yarn(mscale=1.0, mscale_all_dim=1.0)
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    ),
    "glm4-moe-lite": Family("glm4_moe_lite", _GLM_MOE | _LATENT),
    "minicpm3": Family("minicpm3", _LATENT | {"dim_model_base": 16, "scale_emb": 12, "scale_depth": 1.4}),
    "hyperclovax": Family(
        "hyperclovax",
        {"head_dim": 16, "attention_multiplier": 0.25, "logits_scaling": 0.5, "embedding_multiplier": 2.0}
        | {"residual_multiplier": 0.7, "use_post_norm": True},
    ),
    "helium": Family("helium", {"head_dim": 16}),
    "flex-olmo": Family("flex_olmo", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe-shared": Family(
        "granitemoeshared", {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
    ),
    "afmoe": Family(
        "afmoe",
        {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8, "global_attn_every_n_layers": 2}
        | {
            "head_dim": 16,
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 2.0,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "minimax-m2": Family(
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rotary_dim": 8,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
    ),
    # as many KV heads as ranks: vLLM has no replicas of them for this model
    "gpt-oss": Family(
        "gpt_oss",
        {
            "head_dim": 32,
            "num_key_value_heads": 4,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gemma3-vision": Family("gemma3", _GEMMA3, wrapper=_GEMMA_VISION),
    "qwen2.5-vl": Family(
        "qwen2_5_vl",
        _multi_rope(2, 3, 3),
        wrapper=_IMAGE_TOKENS | {"vision_config": _SMALL_TOWER | {"window_size": 16, "fullatt_block_indexes": [0]}},
    ),
    "qwen3-vl": Family(
        "qwen3_vl",
        _multi_rope(2, 3, 3),
        wrapper=_IMAGE_TOKENS
        | {"vision_config": _SMALL_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    ),
    "mistral3": Family(
        "mistral3",
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        wrapper={
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "head_dim": 8,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_token_index": 1000,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
    ),
    "glm4v": Family(
        "glm4v",
        {"pad_token_id": 0, "attention_bias": True, **_multi_rope(2, 1, 1)},
        wrapper=_IMAGE_TOKENS
        | {"vision_config": _SMALL_TOWER | {"image_size": 16, "out_hidden_size": 64, "spatial_merge_size": 2}},
    ),
}


SIZES = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """A family with changes to its config, and how it is trained: tokens per micro-batch (the samples hold 145)."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 256
    gradient_checkpointing: bool = False
    stored_head: str = ""
    """The head that the checkpoint of a tied model has in addition: "equal" to the embedding or "other"."""

    def config(self) -> PretrainedConfig:
        return FAMILIES[self.family].config(**self.changes)

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint: cases with the same config share one."""
        head = [f"{self.stored_head}-head"] if self.stored_head else []
        return "-".join([self.family, *(f"{key}={value}" for key, value in self.changes.items()), *head])

    @property
    def tolerance(self) -> float:
        return FAMILIES[self.family].tolerance


CASES = {name: Case(name) for name in FAMILIES} | {
    "3 micro-batches": Case("qwen3", max_tokens=64),
    "3 micro-batches, checkpointing, tied": Case("qwen3-tied", {}, 64, True),
    "checkpointing": Case("llama-biases", {}, 256, True),
    "a rank without vocabulary rows": Case("llama", {"vocab_size": 70}),
    "one KV head": Case("qwen3", {"num_key_value_heads": 1}, 64),
    "padding token in the text": Case("llama", {"pad_token_id": 7}),
    "fused rows replicated in part": Case("phi3", {"num_key_value_heads": 1}, 64),
    "experts and checkpointing": Case("qwen3-moe", {}, 64, True),
    "recurrence and checkpointing": Case("qwen3.5", {}, 64, True),
    "tied, its head stored as well": Case("qwen3-tied", stored_head="equal"),
    "tied by its config, another head stored": Case("qwen3-tied", stored_head="other"),
}


def store_head(folder: Path, rows: slice | None = None) -> None:
    """Add a copy of the embedding to the checkpoint of a tied model as its head, with other values in ``rows``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    if rows is not None:
        head[rows] += torch.randn_like(head[rows]) * head.std()
    save_file(tensors | {"lm_head.weight": head}, path, {"format": "pt"})


# Beyond the tiny models of the gradient suite: head sizes that vLLM's CPU kernels take, and room for 512 positions.
SERVED: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "gemma3": {},
    "qwen3-moe": {"head_dim": 32},
    "gpt-oss": {},
    "deepseek-v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "qwen3.5": {
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
}  # fmt: skip

# Model types that bind_model refuses, and its messages.
REFUSED = {
    "recurrent_gemma": r"RecurrentGemmaForCausalLM: its forward pass changes the logits",
    "llama4_text": r"layer type chunked_attention",
    "bamba": r"mamba \(BambaMixer\): its recurrent state would run on",
    "t5": r"t5: got an encoder-decoder model",
    "gpt2": r"GPT2LMHeadModel: its head could not be tried: got AttributeError: .*cross_attentions",
    "gpt_bigcode": r"GPTBigCodeForCausalLM: its head could not be tried: got AttributeError: .*cross_attentions",
    "opt": r"OPTAttention: got no boundaries of packed sequences",
    "falcon": r"falcon at 1 / 1 of its width: got KeyError: 'apollo_packed'",
    "gptj": r"gptj at 1 / 1 of its width: got KeyError: 'apollo_packed'",
    "gemma4_text": r"gemma4_text at 1 / 1 of its width: got AmbiguousGlobalPerLayerAttributeError: 'head_dim'",
    "bloom": r"BloomForCausalLM cannot be trained.*\n.*attention is not exchangeable",
}
