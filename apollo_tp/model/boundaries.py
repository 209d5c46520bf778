"""The boundaries of packed sequences for layers that take the keywords of a forward pass and do not hand them to their
attention (Nemotron, StableLM): a hook gives them to the attention itself."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.towers import language_model

KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sequence_lengths")


class BoundariesMissingError(UnsupportedModelError):
    """Attention of the class ``owner`` was called without the boundaries of packed sequences."""

    def __init__(self, owner: type[nn.Module]) -> None:
        super().__init__(
            f"{owner.__name__}: got no boundaries of packed sequences for its attention, expected the keywords of the "
            "forward pass; serve another model"
        )
        self.owner = owner


def hand_boundaries_to(module: PreTrainedModel, owner: type[nn.Module]) -> None:
    """From now on, modules of the class ``owner`` get the boundaries of each forward pass of ``module``. In place; layers
    around them are not compiled (``needs_hook``), since what the hook keeps is no input of theirs."""
    kept: dict[str, Any] = {}

    def keep(_base: nn.Module, _args: Any, keywords: dict[str, Any]) -> None:
        kept.update({name: keywords[name] for name in KEYWORDS})

    def add(_attention: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, kept | keywords

    language_model(module).register_forward_pre_hook(keep, with_kwargs=True)
    for attention in module.modules():
        if type(attention) is owner:
            attention.register_forward_pre_hook(add, with_kwargs=True)
            attention.gets_boundaries_by_hook = True  # type: ignore[assignment]


def needs_hook(layer: nn.Module) -> bool:
    """Whether a module in ``layer`` gets its boundaries by a hook."""
    return any(getattr(module, "gets_boundaries_by_hook", False) for module in layer.modules())
