"""Which part of a model that sees images is its language model, and which checkpoint tensors belong to the rest."""

from __future__ import annotations

import pytest
import torch

from apollo_tp.model.build import build_on_meta
from apollo_tp.model.names import map_names
from apollo_tp.model.towers import language_model
from tests.support.families import FAMILIES

VISION = {name: family for name, family in FAMILIES.items() if family.wrapper}


@pytest.mark.parametrize("name", VISION)
def test_only_the_language_model_and_its_head_are_built(name: str) -> None:
    module = build_on_meta(VISION[name].config(), 2, torch.float32)
    decoder = language_model(module)
    assert decoder.config is module.config.get_text_config()
    inside = {id(p) for part in (decoder, module.get_output_embeddings()) for p in part.parameters()}
    assert {id(p) for p in module.parameters()} == inside
    modules, tensors = module.left_out
    assert tensors
    assert all(tensor.startswith(tuple(f"{prefix}." for prefix in modules)) for tensor in tensors)


@pytest.mark.parametrize(
    ("family", "trained", "untouched", "unknown"),
    [
        (
            "qwen2.5-vl",
            ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
            ["visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.bias"],
            "model.layers.0.mlp.side_proj.weight",
        ),
        (
            "gemma3-vision",
            ["language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.embed_tokens.weight"],
            ["vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_input_projection_weight"],
            "language_model.model.layers.0.mlp.side_proj.weight",
        ),
    ],
)
def test_names_of_published_checkpoints_are_told_apart(
    family: str, trained: list[str], untouched: list[str], unknown: str
) -> None:
    """By transformers' own rules, also where its modules have other names; what nothing has a place for is refused."""
    module = build_on_meta(FAMILIES[family].config(), 1, torch.float32)
    names = map_names(module, [*trained, *untouched, unknown])
    assert sorted(name for parts in names.parts.values() for part in parts for name in part) == sorted(trained)
    assert sorted(names.untouched) == sorted(untouched)
    assert list(names.refused) == [unknown]


def test_a_model_of_text_is_built_in_full() -> None:
    module = build_on_meta(FAMILIES["qwen3"].config(), 1, torch.float32)
    assert module.left_out == ([], {})
    assert language_model(module) is module.base_model
