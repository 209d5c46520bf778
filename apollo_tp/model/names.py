"""Which checkpoint tensors make up which module parameter, by transformers' own renaming rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from apollo_tp.model.towers import belongs_to_images


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


def map_names(module: PreTrainedModel, names: Iterable[str]) -> NameMap:
    """Assign every checkpoint tensor name to a parameter or buffer of ``module``, to ``untouched`` or to ``refused``."""
    transforms = get_model_conversion_mapping(module, add_legacy=False)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    parameters |= dict(module.named_buffers(remove_duplicate=False))
    everything = parameters | module.left_out[1]  # type: ignore[index, operator]
    result = NameMap()
    collected: dict[str, dict[int, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, everything)
        if belongs_to_images(module, target) or name.startswith("mtp."):
            result.untouched.append(name)
            continue
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


def _only_stacks(converter: WeightConverter) -> bool:
    """True for stack-the-experts, and for stack-then-join-gate-and-up: both keep every tensor's rows and columns."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
