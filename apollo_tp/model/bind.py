"""bind_model: the Hugging Face model of a checkpoint over the memory that a vLLM rank serves from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.bound import BoundModel, BoundParameter, Role
from apollo_tp.model.build import build_on_meta, has_whole_heads
from apollo_tp.model.compiled import CompileOptions, compile_layers, decoder_layers
from apollo_tp.model.experts import has_experts
from apollo_tp.model.families import logits_transform, refuse_unknown_layers
from apollo_tp.model.fp8_layers import install_fp8
from apollo_tp.model.gradients import GradientLocation, GradientSync
from apollo_tp.model.joined import JoinedLinear, JoinedPart, stack_rows
from apollo_tp.model.loss import VocabShard
from apollo_tp.model.names import NameMap, map_names
from apollo_tp.model.recurrent import respect_boundaries
from apollo_tp.model.regions import (
    FullWidthRMSNorm,
    RowParallelLinear,
    inside,
    install_full_width_norms,
    install_regions,
    refuse_mixed_channels,
    refuse_wrong_cuts,
)
from apollo_tp.model.tp_linear import VocabParallelEmbedding
from apollo_tp.model.trial import try_out
from apollo_tp.shards.boxes import Shard

Shards = dict[str, tuple[Shard, Tensor]]
Index = tuple[int | slice, ...]


def bind_model(
    config: PretrainedConfig,
    shards: Shards,
    tp: TPGroup,
    *,
    fused_tensors: Iterable[Sequence[str]] = (),
    gradient_checkpointing: bool = False,
    compiled: CompileOptions | None = None,
    fp8: bool = False,
    trust_remote_code: bool = False,
) -> BoundModel:
    """Put this rank's ``shards`` in as the parameters of the model of ``config``, without a copy.

    ``shards`` maps checkpoint names to the shard record and the local tensor (shape ``shard.local_shape``, a view of the
    served memory; vocabulary-parallel tensors without padding rows). ``fused_tensors`` lists names that share a served
    tensor: where their rows follow each other, they run as one product. ``compiled``: how decoder layers are compiled; not
    at all if None. ``fp8``: linear layers of decoder layers multiply in FP8 (``install_fp8``). Collective over ``tp``: the
    sums of a forward pass, and those of GradientSync. Raises UnsupportedModelError that lists every tensor and parameter
    that does not fit.
    """
    module = build_on_meta(config, tp.size, _dtype(shards), trust_remote_code=trust_remote_code)
    refuse_unknown_layers(module)
    names = map_names(module, shards)
    vocabulary = _VocabularyNames.of(module, names)
    transform = logits_transform(module)
    install_full_width_norms(module, tp)
    leaves = _fill(module, names, shards, vocabulary, tp)
    whole = {name: leaf.parts[0][0] for name, leaf in leaves.items() if not leaf.parts[0][1]}
    refuse_wrong_cuts(module, config, whole, tp)
    refuse_mixed_channels(module, whole, tp)
    parameter_of = {part.name: name for name, leaf in leaves.items() for part, index in leaf.parts if not index}
    for group in (
        fused_tensors if getattr(module.config.get_text_config(), "clip_qkv", None) is None else ()
    ):  # clipped in place: not a view
        _join(module, leaves, [parameter_of[name] for name in group if name in parameter_of])
    embedding = shards[names.parts[vocabulary.embedding][0][0]][0]
    vocab = replace(_install_vocabulary(module, embedding, vocabulary, tp, transform), compiled=compiled is not None)
    respect_boundaries(module)
    regions = install_regions(module, _cut_last(leaves), tp)
    _check_cuts_in_regions(leaves, regions, vocabulary, tp)
    module.to(next(iter(leaves.values())).parameter.device)  # buffers: the parameters are there already
    attention_window = try_out(module)
    if fp8:
        install_fp8(module)
    if gradient_checkpointing:
        _enable_checkpointing(module)
    num_compiled = compile_layers(module, compiled) if compiled else 0
    locations: dict[bool, list[GradientLocation]] = {True: [], False: []}
    for name, leaf in leaves.items():
        in_region = inside(name, regions) and not _is_row_parallel_bias(module, name)
        locations[in_region] += [(shard, leaf.parameter, index) for shard, index in leaf.parts]
    sync = GradientSync(locations[True], locations[False], tp)
    return BoundModel(
        module=module,
        parameters=_bound_parameters(module, leaves, vocabulary, sync),
        untouched=(*names.untouched, *names.untrained.values()),
        attention_window=attention_window,
        is_static=num_compiled == len(decoder_layers(module)) and not gradient_checkpointing,
        tp=tp,
        head_weight=leaves[vocabulary.embedding if vocabulary.tied else vocabulary.head].parameter,
        vocab=vocab,
        gradient_sync=sync,
    )


@dataclass(frozen=True)
class _Leaf:
    """A module parameter and the checkpoint tensors it is made of: (shard, index into the parameter)."""

    parameter: nn.Parameter
    parts: list[tuple[Shard, Index]]


@dataclass(frozen=True)
class _VocabularyNames:
    """Parameter names of the embedding and the head."""

    embedding: str
    head: str
    tied: bool

    @classmethod
    def of(cls, module: PreTrainedModel, names: NameMap) -> _VocabularyNames:
        """The head is tied if there is no checkpoint tensor for it. Raises UnsupportedModelError for a head with a bias."""
        head = module.get_output_embeddings()
        if head is None or head.bias is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__}: got no plain head, expected a linear one without bias"
            )
        found = {id(child): name for name, child in module.named_modules()}
        head_name = f"{found[id(head)]}.weight"
        return cls(f"{found[id(module.get_input_embeddings())]}.weight", head_name, tied=head_name not in names.parts)

    def __contains__(self, name: str) -> bool:
        return name in (self.embedding, self.head)


def _dtype(shards: Shards) -> torch.dtype:
    """The dtype that most of this rank's matrices have. Raises UnsupportedModelError if there are none."""
    counts = Counter(tensor.dtype for _, tensor in shards.values() if tensor.ndim >= 2)
    if not counts:
        raise UnsupportedModelError("got no matrices to train, expected the tensors of a language model")
    return counts.most_common(1)[0][0]


def _fill(
    module: PreTrainedModel, names: NameMap, shards: Shards, vocabulary: _VocabularyNames, tp: TPGroup
) -> dict[str, _Leaf]:
    """Replace every meta parameter of ``module`` by one over the local tensors, without a copy; returns them by name.

    In the module's order, without a tied head. Raises UnsupportedModelError that lists all that does not fit.
    """
    problems = [f"{name}: {reason}" for name, reason in names.refused.items()]
    leaves: dict[str, _Leaf] = {}
    problems += _place_untrained(module, names, shards)
    for name, meta in list(module.named_parameters()):
        if name in names.untrained:
            continue
        if vocabulary.tied and name == vocabulary.head:
            continue
        if name not in names.parts:
            problems.append(f"{name}: the model has this parameter, but no checkpoint tensor for it is served")
            continue
        expected = tuple(meta.shape)
        owner, _, attribute = name.rpartition(".")
        if name in vocabulary or isinstance(module.get_submodule(owner), FullWidthRMSNorm):
            expected = (shards[names.parts[name][0][0]][0].local_shape[0], *expected[1:])
        elif has_whole_heads(module, name) or isinstance(module.get_submodule(owner), nn.Linear):
            expected = _part_of(names.parts[name], shards, expected, rows=has_whole_heads(module, name))
        leaf = _assemble(names.parts[name], shards, expected)
        if isinstance(leaf, str):
            problems.append(f"{name}: {leaf}")
            continue
        leaves[name] = leaf
        linear = module.get_submodule(owner)
        linear.register_parameter(attribute, leaf.parameter)
        if isinstance(linear, nn.Linear) and attribute == "weight":
            linear.out_features, linear.in_features = leaf.parameter.shape
    if not problems:
        filled = {shard.name for leaf in leaves.values() for shard, _ in leaf.parts}
        lost = sorted(shards.keys() - filled - set(names.untouched) - set(names.untrained.values()))
        problems = [f"{name}: got it served, expected a parameter that is trained from it" for name in lost]
    if problems:
        raise UnsupportedModelError(
            f"rank {tp.rank} of {tp.size}: {len(problems)} tensors do not fit {type(module).__name__} at this rank's "
            "width; serve a supported model unquantised:\n  " + "\n  ".join(problems)
        )
    return leaves


def _part_of(parts: list[list[str]], shards: Shards, whole: tuple[int, ...], *, rows: bool) -> tuple[int, ...]:
    """The local shape of a parameter of which the module has the ``whole`` shape, cut in its columns (of linear layers whose
    width is not that of the heads by the config, as in Helium) or, if ``rows``, in any dimension."""
    shard = shards[parts[0][0]][0]
    return shard.local_shape if shard.global_shape == whole and (rows or shard.dim == 1) else whole


def _place_untrained(module: PreTrainedModel, names: NameMap, shards: Shards) -> list[str]:
    """Put the served tensors of ``names.untrained`` in, as views: what the server computes with. Returns what does not
    fit."""
    problems = []
    for name, checkpoint in names.untrained.items():
        (shard, tensor), owner = shards[checkpoint], module.get_submodule(name.rpartition(".")[0])
        attribute = name.rpartition(".")[2]
        expected = tuple(getattr(owner, attribute).shape)
        if shard.dim is not None or tuple(tensor.shape) != expected:
            problems.append(
                f"{name}: got local shape {tuple(tensor.shape)}, expected {expected}, the same on all ranks"
            )
        elif attribute in owner._parameters:
            owner.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(attribute, tensor)
    return problems


def _assemble(parts: list[list[str]], shards: Shards, expected: tuple[int, ...]) -> _Leaf | str:
    """One parameter of the local shape ``expected`` over the named local tensors, or why that is not possible."""
    for name in (name for part in parts for name in part):
        shard, tensor = shards[name]
        if tuple(tensor.shape) != shard.local_shape:
            return f"got {name} of local shape {tuple(tensor.shape)}, its shard says {shard.local_shape}"
    first_shard, first = shards[parts[0][0]]
    if len(parts) == 1 and len(parts[0]) == 1:
        if not first_shard.ranges and first_shard.dim == 0 and first_shard.global_shape == expected:
            # another rank has it, and adds it to a sum over the ranks; the server has zeros here
            zeros = nn.Parameter(torch.zeros(expected, dtype=first.dtype, device=first.device))
            return _Leaf(zeros, [(first_shard, (slice(0, 0),))])
        if tuple(first.shape) != expected:
            return f"got local shape {tuple(first.shape)}, expected {expected} (global {first_shard.global_shape})"
        return _Leaf(nn.Parameter(first), [(first_shard, ())])
    return _stack(parts, shards, expected)


def _stack(parts: list[list[str]], shards: Shards, expected: tuple[int, ...]) -> _Leaf | str:
    """E experts as one parameter of shape ``expected`` [E, parts x R, C], a view of the local tensors [R, C].

    Or why that is not possible: the tensors are not stacked so in the served memory.
    """
    experts, rows = len(parts[0]), expected[1] // len(parts)
    if experts != expected[0] or any(len(part) != experts for part in parts):
        return f"got {[len(part) for part in parts]} expert tensors, expected {expected[0]} for each part"
    first = shards[parts[0][0]][1]
    storage = first.untyped_storage().data_ptr()
    stride = (
        shards[parts[0][1]][1].storage_offset() - first.storage_offset() if experts > 1 else expected[1] * expected[2]
    )
    stacked_parts: list[tuple[Shard, Index]] = []
    for expert in range(experts):
        for j, part in enumerate(parts):
            shard, tensor = shards[part[expert]]
            offset = first.storage_offset() + expert * stride + j * rows * first.stride(0)
            found = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if found != (storage, offset, (rows, expected[2]), first.stride()):
                return (
                    f"got {part[expert]} {tuple(tensor.shape)} at another place than its neighbours say, expected stacked "
                    f"experts {expected}; serve with --moe-backend triton and without expert parallelism"
                )
            stacked_parts.append((shard, (expert, slice(j * rows, (j + 1) * rows)) if len(parts) > 1 else (expert,)))
    stacked = first.as_strided(expected, (stride, *first.stride()), first.storage_offset())
    return _Leaf(nn.Parameter(stacked), stacked_parts)


def _enable_checkpointing(module: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass. transformers asks for layers in training mode for that.

    The modules in them stay in evaluation mode: they would draw random numbers (dropout, noise in routers), and the server
    does not.
    """
    module.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in module.modules():
        layer.training = getattr(layer, "gradient_checkpointing", False)


def _join(module: PreTrainedModel, leaves: dict[str, _Leaf], names: list[str]) -> None:
    """Turn the linear layers of the parameters ``names`` into parts of one product, if their rows are adjacent in memory.

    In place; ``leaves`` then has the joined parameter for each of them. Nothing changes for layers that cannot be joined.
    """
    owners = {name.rpartition(".")[0]: name for name in names if name.endswith(".weight")}
    order = sorted(owners, key=lambda owner: leaves[owners[owner]].parameter.storage_offset())
    linears = [module.get_submodule(owner) for owner in order]
    siblings = len({owner.rpartition(".")[0] for owner in order}) == 1
    if len(order) < 2 or not siblings or not all(type(linear) is nn.Linear for linear in linears):
        return
    weight = stack_rows([linear.weight.data for linear in linears])  # type: ignore[misc]
    biased = {linear.bias is not None for linear in linears}
    bias = stack_rows([linear.bias.data for linear in linears]) if biased == {True} else None  # type: ignore[misc, union-attr]
    if weight is None or len(biased) > 1 or (bias is None) == biased.pop():
        return
    rows = [linear.out_features for linear in linears]
    joined = JoinedLinear(nn.Parameter(weight), None if bias is None else nn.Parameter(bias), rows)
    start = 0
    for position, (owner, count) in enumerate(zip(order, rows, strict=True)):
        parent, _, child = owner.rpartition(".")
        setattr(module.get_submodule(parent), child, JoinedPart(joined, position))
        for attribute, parameter in joined.named_parameters():
            shard = leaves[f"{owner}.{attribute}"].parts[0][0]
            leaves[f"{owner}.{attribute}"] = _Leaf(parameter, [(shard, (slice(start, start + count),))])
        start += count


def _install_vocabulary(
    module: PreTrainedModel, shard: Shard, vocabulary: _VocabularyNames, tp: TPGroup, transform: object
) -> VocabShard:
    """Replace the embedding by the vocabulary-parallel one; the head module stays, as the owner of its weight.

    ``shard`` is the embedding's. Returns the vocabulary rows of this rank.
    """
    cut = shard.dim == 0
    start = shard.ranges[0][0] if cut and shard.ranges else 0
    rows = shard.global_shape[0] if cut else 0
    vocab = VocabShard(start, tp if cut else TPGroup.single(), transform, global_rows=rows)  # type: ignore[arg-type]
    replaced = module.get_input_embeddings()
    module.set_input_embeddings(VocabParallelEmbedding(replaced, replaced.weight, vocab))
    if vocabulary.tied:
        module.get_output_embeddings().weight = replaced.weight
    return vocab


def _cut_last(leaves: dict[str, _Leaf]) -> list[str]:
    """Parameters cut on their last dimension, which is not their first."""
    return [
        name
        for name, leaf in leaves.items()
        if (shard := leaf.parts[0][0]).dim is not None and shard.dim == len(shard.global_shape) - 1 > 0
    ]


def _check_cuts_in_regions(
    leaves: dict[str, _Leaf], regions: list[str], vocabulary: _VocabularyNames, tp: TPGroup
) -> None:
    """Raise UnsupportedModelError that lists tensors which are cut outside of parallel regions and the vocabulary."""
    outside = [
        f"{name} (cut on dimension {leaf.parts[0][0].dim})"
        for name, leaf in leaves.items()
        if leaf.parts[0][0].dim is not None and name not in vocabulary and not inside(name, regions)
    ]
    if outside:
        raise UnsupportedModelError(
            f"rank {tp.rank} of {tp.size}: tensors are cut outside of any block with a row-parallel product, so it is "
            "unknown where their outputs are summed:\n  " + "\n  ".join(outside)
        )


def _is_row_parallel_bias(module: PreTrainedModel, name: str) -> bool:
    """True for a bias that is added after the reduction: every rank computes its full gradient."""
    owner, _, attribute = name.rpartition(".")
    return attribute == "bias" and isinstance(module.get_submodule(owner), RowParallelLinear)


def _bound_parameters(
    module: PreTrainedModel, leaves: dict[str, _Leaf], vocabulary: _VocabularyNames, sync: GradientSync
) -> list[BoundParameter]:
    """One for each checkpoint tensor, in the order of ``leaves``, which is that of the module on every rank."""
    bound = []
    for name, leaf in leaves.items():
        is_stack_of_biases = leaf.parameter.ndim == 2 and has_experts(module.get_submodule(name.rpartition(".")[0]))
        for shard, index in leaf.parts:
            role: Role = "other"
            if name in vocabulary:
                role = "embedding"
            elif len(shard.global_shape) == 2 and not is_stack_of_biases:
                role = "matrix"
            bound.append(BoundParameter(shard.name, shard, role, leaf.parameter, index, shard.name in sync.partial))
    return bound
