"""Where collectives go, read off the shards (no table per architecture), and whether fused tensors are cut part by part.

A parameter cut on its last dimension belongs to a row-parallel product whose outputs are partial sums. The block around it
(attention, MLP, mixer, stacked experts) is a *parallel region*: identity forward and all-reduce backward at its inputs
(Megatron's f), all-reduce forward after the row-parallel product (Megatron's g).

A fused tensor has rows that a module splits into parts: a rank must have its share of every part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig, PreTrainedModel

from apollo_tp.distributed.collectives import copy_to_region, reduce_from_region
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.build import refusing
from apollo_tp.model.experts import has_experts, interleaves
from apollo_tp.model.families import FULL_WIDTH_NORMS, FUSED_TENSORS
from apollo_tp.model.fp8_linear import row_parallel_fp8_linear
from apollo_tp.model.joined import JoinedPart
from apollo_tp.model.tp_linear import row_parallel_linear
from apollo_tp.shards.boxes import Shard, merge_ranges

_PRODUCTS = (nn.Linear, nn.Embedding, nn.Conv1d)
"""Modules whose cut outputs depend on their own rows alone, or, cut on the last dimension, are summed."""


class RowParallelLinear(nn.Module):
    """``x @ weight.T`` summed over the ranks, then the bias, once. One all-reduce in forward, none in backward.

    ``weight`` local [R, C_local], ``bias`` [R], the same on all ranks.
    """

    def __init__(self, linear: nn.Linear, tp: TPGroup) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.tp = tp
        self.is_fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` local [..., C_local] to [..., R], the same on all ranks."""
        multiply = row_parallel_fp8_linear if self.is_fp8 else row_parallel_linear
        out = multiply(x, self.weight, self.tp)
        return out if self.bias is None else out + self.bias


class FullWidthRMSNorm(nn.Module):
    """RMS norm whose mean square runs over the heads of all ranks, replicated heads counted once.

    ``weight`` is either local [C_local] or, as vLLM keeps it, [C] on each rank, of which a rank uses its own C_local. One
    all-reduce of the mean squares fp32 [..., 1] in forward, one in backward.
    """

    def __init__(self, replaced: nn.Module, width: int, tp: TPGroup) -> None:
        super().__init__()
        self.weight = replaced.weight
        self.width = width
        self.eps = replaced.variance_epsilon
        self.tp = tp

    def _local_weight(self) -> Tensor:
        """This rank's part [C_local] of the weight."""
        full = self.weight.shape[0]
        if full == self.width:
            return self.weight
        replicas = self.tp.size * self.width // full
        start = self.tp.rank // replicas * self.width
        return self.weight[start : start + self.width]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` local [..., C_local] to the same shape and dtype, local."""
        wide = x.float()
        mean_square = wide.pow(2).mean(-1, keepdim=True) / self.tp.size
        mean_square = copy_to_region(reduce_from_region(mean_square, self.tp), self.tp)
        return (self._local_weight() * (wide * torch.rsqrt(mean_square + self.eps))).to(x.dtype)


def install_full_width_norms(module: nn.Module, tp: TPGroup) -> None:
    """Replace query and key norms that span the heads of all ranks by FullWidthRMSNorm, in place."""
    if tp.size == 1:
        return
    for block in list(module.modules()):
        for name, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            norm = getattr(block, name, None)
            if type(norm).__name__ in FULL_WIDTH_NORMS:  # some are as wide as the hidden states, which is not divided
                width = block.get_submodule(projection).out_features
                setattr(block, name, FullWidthRMSNorm(norm, width, tp))


def install_regions(module: nn.Module, cut_last: list[str], tp: TPGroup) -> list[str]:
    """Turn the blocks around the parameters ``cut_last`` (names, cut on their last dimension) into parallel regions.

    Returns the names of the region modules. Raises UnsupportedModelError if such a parameter is neither the weight of a
    linear layer nor of stacked experts.
    """
    regions: list[str] = []
    enter, leave = (
        _enter_hook(tp),
        _leave_hook(tp),
    )  # one of each for all layers: compiled code checks which hooks there are
    for name in cut_last:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if isinstance(owner, nn.Linear) and leaf == "weight":
            region_name, _, child = owner_name.rpartition(".")
            region = module.get_submodule(region_name)
            setattr(region, child, RowParallelLinear(owner, tp))
        elif has_experts(owner):  # cut before or after their products' sums, by how they are stored: summed once
            region_name, region = owner_name, owner
            if region_name not in regions:
                region.register_forward_hook(leave)
        else:
            raise UnsupportedModelError(
                f"{name}: got a parameter of {type(owner).__name__} cut on its last dimension, expected that of a linear "
                "layer or of stacked experts; this architecture has no known way to run tensor-parallel here"
            )
        if region_name not in regions:
            region.register_forward_pre_hook(enter, with_kwargs=True)
            regions.append(region_name)
    return regions


def inside(name: str, regions: list[str]) -> bool:
    """True if the parameter ``name`` lies in one of ``regions`` (module names)."""
    return any(name.startswith(f"{region}.") for region in regions)


def _enter_hook(tp: TPGroup) -> Any:
    """A pre-hook that passes every tensor among a region's inputs through ``copy_to_region``."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def step_in(outside: Tensor) -> Tensor:
            if tp.size == 1 or not outside.requires_grad:
                return outside
            inside = copy_to_region(outside, tp)
            for child in module.children():
                if isinstance(child, JoinedPart) and child.position == 0:
                    child.joined.enter(outside, inside, tp)
            return inside

        return pytree.tree_map_only(Tensor, step_in, (args, kwargs))

    return enter


def _leave_hook(tp: TPGroup) -> Any:
    """A hook that sums a region's output over the ranks."""

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return reduce_from_region(output, tp)

    return leave


def refuse_mixed_channels(module: nn.Module, shards: Mapping[str, Shard], tp: TPGroup) -> None:
    """Raise UnsupportedModelError that lists norms among the owners of ``shards`` (by parameter) whose weight is cut and
    whose output on this rank would need the channels of other ranks, such as a norm over the heads of all ranks that
    FULL_WIDTH_NORMS does not list.

    Each is tried with a few numbers, whatever it is called: a norm over each head by itself may be cut between heads. No
    collective.
    """
    wrong = []
    for name, shard in shards.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        is_product = isinstance(owner, (*_PRODUCTS, FullWidthRMSNorm)) or has_experts(owner)
        tried = not is_product and not list(owner.children())
        if shard.dim is None or len(shard.global_shape) > 2 or not tried:
            continue
        with refusing(f"{name} ({type(owner).__name__}), which is cut on dimension {shard.dim}, could not be tried"):
            mixes = _mixes_channels(owner, shard.local_shape, shard.dim)
        if mixes:
            wrong.append(f"{name} ({type(owner).__name__}): cut on dimension {shard.dim}, over which it normalises")
    if wrong:
        raise UnsupportedModelError(
            f"rank {tp.rank} of {tp.size}: got {len(wrong)} weights cut over ranks whose modules need the channels of all "
            "ranks, expected norms within what a rank has, or those that apollo_tp.model.families.FULL_WIDTH_NORMS lists; "
            "serve at tensor-parallel size 1:\n  " + "\n  ".join(wrong)
        )


def _mixes_channels(owner: nn.Module, shape: tuple[int, ...], dim: int) -> bool:
    """Whether the output of ``owner`` for an input of this local shape has, at the first index of dimension ``dim``, a
    gradient with respect to the input at others."""
    weight = next(owner.parameters())
    numbers = torch.linspace(-1.0, 2.0, math.prod(shape), device=weight.device, dtype=weight.dtype)
    values = numbers.view(1, *shape).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(owner(values).select(dim + 1, 0).sum(), values)
    return bool(gradient.narrow(dim + 1, 1, shape[dim] - 1).any())


Ranges = tuple[tuple[int, int], ...]


def refuse_wrong_cuts(
    module: PreTrainedModel, config: PretrainedConfig, shards: Mapping[str, Shard], tp: TPGroup
) -> None:
    """Raise UnsupportedModelError that lists the fused tensors among ``shards`` (by parameter) which are cut across parts.

    ``module`` has this rank's width, ``config`` is that of the checkpoint. Such a cut can have the right shape: vLLM's
    Transformers backend gathers outputs before it splits them, the module here splits those of its rank.
    """
    wrong = []
    for name, shard in shards.items():
        kind = next((kind for kind in name.split(".")[-2:] if kind in FUSED_TENSORS), None)
        if kind is None or shard.dim is None:
            continue
        full, local = (FUSED_TENSORS[kind](c) for c in (config.get_text_config(), module.config.get_text_config()))
        if interleaves(module.get_submodule(name.rpartition(".")[0])):
            full, local = (1,), (1,)
        expected = _shares(shard.global_shape[shard.dim], full, shard.local_shape[shard.dim], local, tp)
        if merge_ranges(shard.ranges) != expected:
            wrong.append(
                f"{shard.name}: got {_text(shard.ranges)} of {shard.global_shape[shard.dim]} along dimension {shard.dim}, "
                f"expected {_text(expected)}, a share of each of the {len(full)} parts that it is split into"
            )
    if wrong:
        raise UnsupportedModelError(
            f"rank {tp.rank} of {tp.size}: {len(wrong)} fused tensors of {type(module).__name__} are served cut across "
            "their parts; serve at tensor-parallel size 1, or by vLLM's own implementation (--model-impl vllm) if it has "
            "one:\n  " + "\n  ".join(wrong)
        )


def _shares(extent: int, full: tuple[int, ...], local_extent: int, local: tuple[int, ...], tp: TPGroup) -> Ranges:
    """This rank's share of each part, as global ranges of ``extent`` indices, of which a rank has ``local_extent``.

    ``full`` and ``local`` are relative sizes of the parts, globally and on a rank. Where there are fewer shares than ranks
    (key and value heads), neighbours have the same.
    """
    ranges, start = [], 0
    for size, local_size in zip(full, local, strict=True):
        rows, local_rows = size * extent // sum(full), local_size * local_extent // sum(local)
        first = start + tp.rank * (rows // local_rows) // tp.size * local_rows
        ranges.append((first, first + local_rows))
        start += rows
    return merge_ranges(ranges)


def _text(ranges: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in ranges)
