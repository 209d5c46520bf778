"""Models that see images: their language model is trained on text, and what belongs to images is left alone.

transformers says which module is the language model (``get_decoder``) and which is its head; its own renaming rules say to
which module a checkpoint tensor goes. Everything else (vision towers, projectors) is left out of the trainer's model: its
tensors stay as the server has them, and go into checkpoints unchanged.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' automatic class for the model of ``config``, with all that belongs to images."""
    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


def language_model(module: PreTrainedModel) -> PreTrainedModel:
    """The decoder of ``module``: token ids to final hidden states."""
    is_text = module.config.get_text_config() is module.config
    return cast(PreTrainedModel, module.base_model if is_text else module.get_decoder())


def leave_out(module: PreTrainedModel) -> None:
    """Remove all modules but the language model, what contains it, and the head, in place. ``left_out`` has the names of
    what is removed: modules, and by name their parameters and buffers."""
    kept = {id(language_model(module)), id(module.get_output_embeddings())}
    modules: list[str] = []
    tensors: dict[str, Tensor] = {}

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            path = f"{prefix}{name}"
            if id(child) in kept:
                continue
            if any(id(inner) in kept for inner in child.modules()):
                visit(child, f"{path}.")
                continue
            modules.append(path)
            tensors.update({f"{path}.{key}": value for key, value in child.state_dict(keep_vars=True).items()})
            setattr(parent, name, None)

    if module.config.get_text_config() is not module.config:
        visit(module, "")
    module.left_out = modules, tensors  # type: ignore[assignment]


def belongs_to_images(module: PreTrainedModel, name: str) -> bool:
    """Whether the parameter ``name``, as transformers names it, is in a module that was left out."""
    modules, _ = cast(tuple[list[str], dict[str, Tensor]], module.left_out)
    return any(name.startswith(f"{left_out}.") for left_out in modules)
