"""Which checkpoint tensors make up which module parameter, by transformers' own renaming rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass
class NameMap:
    """``parts[parameter][j]`` are the checkpoint tensors of part j of a parameter, in order.

    A parameter that is one checkpoint tensor has one part with one name. Stacked experts [E, parts x R, C] have E names in
    each part: part 0 the gate projections, part 1 the up projections. ``untrained`` maps buffers, and parameters without a
    gradient, to the tensor that they are (a router's correction of its choice, for example): the model computes with them
    and nobody changes them. ``untouched`` are tensors outside the language model (vision towers, multi-token prediction);
    ``refused`` maps the rest to the reason.
    """

    parts: dict[str, list[list[str]]] = field(default_factory=dict)
    untrained: dict[str, str] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def map_names(module: PreTrainedModel, config: PretrainedConfig, names: Iterable[str]) -> NameMap:
    """Assign every checkpoint tensor name to a parameter or buffer of ``module``, to ``untouched`` or to ``refused``."""
    wrapped = config.get_text_config() is not config
    transforms = get_model_conversion_mapping(module, add_legacy=False)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    parameters |= dict(module.named_buffers(remove_duplicate=False))
    result = NameMap()
    collected: dict[str, dict[int, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        text_name = _language_model_name(name) if wrapped else name
        if text_name is None or text_name.startswith("mtp."):
            result.untouched.append(name)
            continue
        target, pattern = rename_source_key(text_name, renamings, converters, module.base_model_prefix, parameters)
        if target not in parameters:
            result.refused[name] = f"{type(module).__name__} has no parameter for it"
            continue
        if pattern is None and not parameters[target].requires_grad:
            result.untrained[target] = name
            continue
        part = 0
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            if not _only_stacks(converter):
                operations = ", ".join(type(operation).__name__ for operation in converter.operations)
                result.refused[name] = f"transformers transforms it on load ({operations})"
                continue
            part = converter.source_patterns.index(pattern)
        collected.setdefault(target, {}).setdefault(part, []).append(name)
    result.parts = {target: [parts[j] for j in sorted(parts)] for target, parts in collected.items()}
    return result


def _language_model_name(name: str) -> str | None:
    """The name within the language model of a wrapped (multimodal) checkpoint, or None if it belongs to another part."""
    if "language_model." in name:
        return name.replace("language_model.", "", 1)
    return name if name == "lm_head.weight" else None


def _only_stacks(converter: WeightConverter) -> bool:
    """True for stack-the-experts, and for stack-then-join-gate-and-up: both keep every tensor's rows and columns."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
