"""What differs between architectures and cannot be read off the shards: one table, a reason per row.

Everything else (which layers exist, where collectives go, what is replicated) follows from the checkpoint's config and the
shards. What is done to the logits is measured in the model's own forward pass when it is bound.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.build import refusing
from apollo_tp.model.loss import LogitsTransform
from apollo_tp.model.recurrent import keeps_boundaries
from apollo_tp.model.towers import language_model

FULL_WIDTH_NORMS = {
    "Olmo2RMSNorm": "OLMo-2 normalises queries and keys over all heads: a rank's mean square covers its own heads only",
    "Olmo3RMSNorm": "as OLMo-2",
    "OlmoeRMSNorm": "as OLMo-2",
    "FlexOlmoRMSNorm": "as OLMo-2",
    "MiniMaxM2RMSNorm": "as OLMo-2",
}
"""Norms inside parallel regions whose mean square spans ranks, by class name, and why; see regions.FullWidthRMSNorm."""


def _delta_net_parts(config: PretrainedConfig) -> tuple[int, ...]:
    """Channels of queries, keys and values."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return keys, keys, config.linear_num_value_heads * config.linear_value_head_dim


FUSED_TENSORS: dict[str, Callable[[PretrainedConfig], tuple[int, ...]]] = {
    "gate_up_proj": lambda _: (1, 1),
    "gate_up_proj_bias": lambda _: (1, 1),
    "input_linear": lambda _: (1, 1),  # Granite's name for it
    "qkv_proj": lambda config: (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.num_key_value_heads,
    ),
    "in_proj_qkv": _delta_net_parts,
    "conv1d": _delta_net_parts,
}
"""Parameters that their modules split into consecutive parts, by name: the relative sizes of the parts. What is split head
by head (``query_key_value``, ``in_proj_qkvz``) is cut as one part, and not listed; so are gate and up where they alternate
(``experts.interleaves``)."""


LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention"}
"""What ``config.layer_types`` may name: attention over full sequences or windows, and gated delta nets."""


def refuse_unknown_layers(module: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, listing all, for layers that would not keep packed sequences apart or run otherwise."""
    unknown = set(getattr(module.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    reasons = [
        f"layer type {kind}: it has no version here that keeps packed sequences apart" for kind in sorted(unknown)
    ]
    if not hasattr(sys.modules[type(language_model(module)).__module__], "ALL_ATTENTION_FUNCTIONS"):
        reasons.append("its attention is not exchangeable in transformers: it would see across packed sequences")
    for name, layer in module.named_modules():
        if isinstance(getattr(layer, "conv1d", None), nn.Conv1d) and not keeps_boundaries(layer):
            reasons.append(f"{name} ({type(layer).__name__}): its recurrent state would run on into the next sequence")
    if reasons:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be trained; use one of the families in docs/models.md:\n  "
            + "\n  ".join(reasons)
        )


def logits_transform(module: PreTrainedModel) -> LogitsTransform:
    """What ``module`` does to final hidden states before its head and to logits after it: multipliers, whatever their names
    (Cohere, Granite, MiniCPM 3, HyperCLOVA X), are measured, a soft cap is ``final_logit_softcapping`` in the config.

    Raises UnsupportedModelError if these two do not reproduce the model's own forward pass on a probe.
    """
    probe = torch.linspace(-40.0, 40.0, 9).view(1, 1, 9)
    small = torch.full((1, 1, 1), 2.0**-10)
    with refusing(f"{type(module).__name__}: its head could not be tried"):
        logits, scale = (_logits_of_probe(module, tensor).double() for tensor in (probe, small))
    softcap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    transform = LogitsTransform(float((scale / small).mean()), None if softcap is None else float(softcap))
    if logits.shape != probe.shape or not torch.allclose(logits, transform(probe.double()), rtol=1e-4):
        raise UnsupportedModelError(
            f"{type(module).__name__}: its forward pass changes the logits in a way that is neither a multiplier nor the "
            "final_logit_softcapping of its config; serve another model"
        )
    return transform


@dataclass
class _HiddenStates(MoeModelOutputWithPast):
    """Final hidden states, with what models that see images have beside them: no images, and positions as they are."""

    image_hidden_states: None = None
    rope_deltas: None = None


def _logits_of_probe(module: PreTrainedModel, probe: torch.Tensor) -> torch.Tensor:
    """The model's logits [1, 1, n] if final hidden states are ``probe`` fp32 [1, 1, n], and its head gives them back."""
    base, head = module.base_model, module.get_output_embeddings()
    try:
        base.forward = lambda *_, **__: _HiddenStates(last_hidden_state=probe)
        head.forward = lambda hidden: hidden
        return module(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits  # type: ignore[no-any-return]
    finally:
        del base.forward, head.forward
