"""How a module of transformers keeps its experts: stacked in parameters of three dimensions, the first being the expert."""

from __future__ import annotations

from torch import nn


def has_experts(module: nn.Module) -> bool:
    """True if ``module`` itself has stacked experts: a parameter of three dimensions that is no convolution's. What it has
    of two dimensions are the experts' biases."""
    stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return stacked and not isinstance(module, nn.Conv1d)


def interleaves(module: nn.Module) -> bool:
    """True if gate and up alternate within the fused parameters of ``module`` (gpt-oss), by what transformers notes of it.
    Such a tensor is cut as one part."""
    return has_experts(module) and not getattr(module, "is_concatenated", True)
