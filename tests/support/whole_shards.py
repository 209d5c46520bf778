"""A Hugging Face model as if one rank had all of it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from apollo_tp.shards.boxes import Shard


def whole_shards(model: PreTrainedModel) -> dict[str, tuple[Shard, torch.Tensor]]:
    """Everything of ``model`` on one rank, by checkpoint name; experts are views of the stacked tensor."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        name: (
            Shard(name, tuple(tensor.shape), None, (), (0,)),
            _expert(name, state) if ".experts." in name else tensor,
        )
        for name, tensor in revert_weight_conversion(model, state).items()
    }


def _expert(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The view of a stacked parameter that a checkpoint's ``...experts.<e>.<projection>.weight`` is."""
    block, _, rest = name.replace(".block_sparse_moe.", ".mlp.").partition(".experts.")
    expert, projection, _ = rest.split(".")
    if projection in ("down_proj", "w2"):
        return state[f"{block}.experts.down_proj"][int(expert)]
    gate, up = state[f"{block}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if projection in ("gate_proj", "w1") else up
