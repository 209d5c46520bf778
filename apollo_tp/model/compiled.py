"""torch.compile, one decoder layer at a time: norms, rotary embeddings, activations and residual sums fuse into few kernels.

Layers of one kind share their compiled code; the first batch of a new length makes it anew for any length. Collectives and
attention stay calls of their own within it. Layers whose code depends on where sequences end (gated delta nets) run as they
are, and models with routed experts as a whole.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_tp.model.attention import cudnn_is_faster
from apollo_tp.model.regions import FullWidthRMSNorm

REPEAT_CHEAP_WORK = True
"""Whether compiled code computes norms, activation functions and the like again in its backward pass where that saves
memory. Matrix products, attention and sums over ranks are never repeated: a budget of activation memory
(``activation_memory_budget`` of torch) would repeat operators that it does not know first, and our sums are such."""
BACKEND = "inductor"
SAME_KERNELS = True
"""Whether the compiler chooses kernels by rule, not by timing them on each GPU: two ranks then sum in the same order."""
JOIN_RESIDUALS = True
"""Whether compiled code adds residuals where it sums products over ranks, see JoinResiduals."""
MAX_VARIANTS = 32
"""Compiled versions of a layer (kinds of layers, fixed and any length) before torch gives up and runs it uncompiled."""


def compile_layers(module: PreTrainedModel) -> int:
    """Compile the decoder layers of ``module`` in place, each at its first call; returns how many.

    None where ranks must not differ in what the compiler does, which it decides on each alone: it may order two collectives
    that do not depend on each other (FullWidthRMSNorm) one way or another; and if two ranks rounded otherwise their routers
    could send a token to different experts. SAME_KERNELS prevents what was seen of it (``tests/gpu/test_replicas.py``); for
    routers that has not been tried.
    """
    if any(isinstance(child, FullWidthRMSNorm) or _has_experts(child) for child in module.modules()):
        return 0
    import torch._dynamo  # here: the compiler takes seconds to import
    import torch._functorch.config
    import torch._inductor.config

    torch.compiler.assume_constant_result(cudnn_is_faster)  # marks the function
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    for reason in ("used_far_apart", "long_fusible_chains", "materialized_backward"):  # to keep what could be repeated
        setattr(torch._functorch.config, f"ban_recompute_{reason}", not REPEAT_CHEAP_WORK)
    from apollo_tp.model.residuals import JoinResiduals

    torch._inductor.config.deterministic = SAME_KERNELS
    torch._inductor.config.joint_custom_pre_pass = JoinResiduals() if JOIN_RESIDUALS else None
    # the gradient of a norm's weight together with that of its input, for any number of tokens
    torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
    layers = [layer for layer in decoder_layers(module) if _is_traceable(layer)]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=BACKEND)  # not the call: hooks around it stay as they are
    return len(layers)


def _has_experts(module: nn.Module) -> bool:
    """Whether stacked experts are its own: a parameter of three dimensions that is no convolution's."""
    stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return stacked and not isinstance(module, nn.Conv1d)


def _is_traceable(layer: nn.Module) -> bool:
    """No recurrent mixer, which has a convolution, the only parameter of three dimensions in a model without experts."""
    return all(parameter.ndim <= 2 for parameter in layer.parameters())


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, in order: what gradient checkpointing would recompute one by one."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
