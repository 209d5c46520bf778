"""Where collectives go, read off the shards: no table per architecture.

A parameter cut on its last dimension belongs to a row-parallel product whose outputs are partial sums. The block around it
(attention, MLP, mixer, stacked experts) is a *parallel region*: identity forward and all-reduce backward at its inputs
(Megatron's f), all-reduce forward after the row-parallel product (Megatron's g).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apollo_tp.distributed.collectives import copy_to_region, reduce_from_region
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.families import FULL_WIDTH_NORMS
from apollo_tp.model.joined import JoinedPart
from apollo_tp.model.tp_linear import row_parallel_linear


class RowParallelLinear(nn.Module):
    """``x_local @ weight_local.T`` summed over TP, then the bias, once. One all-reduce forward, none backward."""

    def __init__(self, linear: nn.Linear, tp: TPGroup) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        out = row_parallel_linear(x, self.weight, self.tp)
        return out if self.bias is None else out + self.bias


class FullWidthRMSNorm(nn.Module):
    """RMS norm whose mean square runs over the heads of all ranks, replicated ones counted once.

    Input local [..., w]; ``weight`` is either local [w] or, as vLLM keeps it, the whole [W] on each rank, of which rank r
    uses its own w. One all-reduce of the mean squares [...] forward, one backward.
    """

    def __init__(self, replaced: nn.Module, width: int, tp: TPGroup) -> None:
        super().__init__()
        self.weight = replaced.weight
        self.width = width
        self.eps = replaced.variance_epsilon
        self.tp = tp

    def _local_weight(self) -> Tensor:
        whole = self.weight.shape[0]
        if whole == self.width:
            return self.weight
        replicas = self.tp.size * self.width // whole
        start = self.tp.rank // replicas * self.width
        return self.weight[start : start + self.width]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = wide.pow(2).mean(-1, keepdim=True) / self.tp.size
        mean_square = copy_to_region(reduce_from_region(mean_square, self.tp), self.tp)
        return (self._local_weight() * (wide * torch.rsqrt(mean_square + self.eps))).to(x.dtype)


def install_full_width_norms(module: nn.Module, tp: TPGroup) -> None:
    """Put FullWidthRMSNorm in the place of query and key norms that span the heads of all ranks."""
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
    )  # one object for all layers: compiled code checks which hooks there are
    for name in cut_last:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if isinstance(owner, nn.Linear) and leaf == "weight":
            region_name, _, child = owner_name.rpartition(".")
            region = module.get_submodule(region_name)
            setattr(region, child, RowParallelLinear(owner, tp))
        elif owner.get_parameter(leaf).ndim == 3:
            region_name, region = owner_name, owner
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
    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return reduce_from_region(output, tp)

    return leave
