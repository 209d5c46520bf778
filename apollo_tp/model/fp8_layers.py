"""Which layers of a bound model multiply in FP8 (``train.matmul=fp8``): the linear layers of its decoder layers."""

from __future__ import annotations

import logging
from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model import fp8_linear
from apollo_tp.model.compiled import decoder_layers
from apollo_tp.model.experts import has_experts
from apollo_tp.model.fp8 import MULTIPLE
from apollo_tp.model.joined import JoinedLinear
from apollo_tp.model.regions import RowParallelLinear
from apollo_tp.model.towers import language_model
from apollo_tp.model.tp_linear import ALONE

log = logging.getLogger(__name__)

CAPABILITY = (8, 9)
"""The first of NVIDIA's GPUs that have FP8 products."""


class Fp8Linear(nn.Module):
    """``x @ weight.T + bias`` in FP8, local. ``weight`` bf16 [R, C], ``bias`` [R]. With one rank, what would be row-parallel
    is one of these."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``x`` bf16 [..., C] to [..., R]."""
        keep = fp8_linear.KEEP_ROW_INPUTS
        return fp8_linear.column_parallel_fp8_linear(x, self.weight, self.bias, (self.out_features,), ALONE, keep)[0]


def install_fp8(module: PreTrainedModel) -> int:
    """Let the linear layers of the decoder layers multiply in FP8, in place; returns how many. Embedding, head, norms,
    routers and attention stay as they are, and so does what does not fit: logged once for each reason.

    After ``install_regions``, before anything is compiled. The same on all ranks, but for uneven cuts, which it may differ
    by: sums over ranks are of the same shape and dtype in either case. Raises UnsupportedModelError for a GPU without FP8.
    """
    _check_device(next(module.parameters()).device)
    kept: dict[str, list[str]] = defaultdict(list)
    count = 0
    names = {child: name for name, child in module.named_modules()}
    for layer in decoder_layers(language_model(module)):
        for parent in list(layer.modules()):
            routes = any(has_experts(child) for child in parent.children())
            if has_experts(parent):
                kept["grouped products of experts"].append(names[parent])
            for name, child in list(parent.named_children()):
                if not isinstance(child, (nn.Linear, RowParallelLinear, JoinedLinear)):
                    continue
                if reason := "a router" if routes and type(child) is nn.Linear else _misfit(child):
                    kept[reason].append(names[child])
                    continue
                count += 1
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Fp8Linear(child))
                else:
                    child.is_fp8 = True
    for reason, layers in kept.items():
        log.info("train.matmul=fp8: %d layers keep bf16 products (%s): %s, ...", len(layers), reason, layers[0])
    log.info("train.matmul=fp8: %d linear layers multiply in FP8", count)
    return count


def _misfit(layer: nn.Linear | RowParallelLinear | JoinedLinear) -> str | None:
    """Why this layer cannot multiply in FP8; None if it can."""
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is more than a linear layer"
    weight = layer.weight
    if weight.dtype is not torch.bfloat16:
        return f"weights in {str(weight.dtype).removeprefix('torch.')}, expected bfloat16"
    if any(extent == 0 or extent % MULTIPLE for extent in weight.shape):
        return f"{weight.shape[0]} x {weight.shape[1]} on this rank, expected multiples of {MULTIPLE}"
    return None


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise UnsupportedModelError(
            f"train.matmul=fp8: got a GPU of compute capability {found[0]}.{found[1]}, expected {CAPABILITY[0]}."
            f"{CAPABILITY[1]} or later, which have FP8 products; set train.matmul=served"
        )
