"""torch.compile, one decoder layer at a time: norms, rotary embeddings, activations and residual sums become few kernels.

Layers of one kind share their compiled code; the first batch of another length makes torch compile it once more, for any
length. Collectives and attention stay calls of their own within it. Layers whose code depends on where sequences end (gated
delta nets) run as they are, and so do all layers of models with routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_tp.model.attention import cudnn_is_faster
from apollo_tp.model.boundaries import needs_hook
from apollo_tp.model.experts import has_experts
from apollo_tp.model.regions import FullWidthRMSNorm

MAX_VARIANTS = 32
"""Compiled versions of a layer (kinds of layers, fixed and any length) before torch gives up and runs it uncompiled."""


@dataclass(frozen=True)
class CompileOptions:
    """How layers are compiled. Some are settings of the whole process: the last call of ``compile_layers`` decides.

    ``deterministic_kernels``: choose kernels by rule, not by timing them on each GPU: two ranks then sum in the same order.
    ``backend``: see torch.compile.
    """

    deterministic_kernels: bool = True
    backend: str = "inductor"


def compile_layers(module: PreTrainedModel, options: CompileOptions) -> int:
    """Compile the decoder layers of ``module`` in place, each at its first call; returns how many.

    The compiler decides on each rank by itself. Where such differences would be wrong, no layer is compiled: two
    independent collectives (FullWidthRMSNorm) could run in different orders, and routers could send a token to
    different experts if two ranks rounded differently. ``deterministic_kernels`` prevents the differences that were
    observed (``tests/gpu/test_replicas.py``); for routers that has not been tried.
    """
    if any(isinstance(child, FullWidthRMSNorm) or has_experts(child) for child in module.modules()):
        return 0
    import torch._dynamo  # here: the compiler takes seconds to import
    import torch._functorch.config
    import torch._inductor.config

    from apollo_tp.model.sum_passes import JoinResiduals, OrderSums

    torch.compiler.assume_constant_result(cudnn_is_faster)  # marks the function
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    # Norms, activation functions and the like are computed again in the backward pass where that saves memory; products,
    # attention and sums over ranks never are: torch's budget of activation memory would repeat unknown operators first.
    for reason in ("used_far_apart", "long_fusible_chains", "materialized_backward"):
        setattr(torch._functorch.config, f"ban_recompute_{reason}", False)
    torch._inductor.config.deterministic = options.deterministic_kernels
    torch._inductor.config.joint_custom_pre_pass = JoinResiduals()
    torch._inductor.config.post_grad_custom_post_pass = OrderSums()
    # computes the gradients of a norm's weight and of its input together, for any number of tokens
    torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
    layers = [layer for layer in decoder_layers(module) if _is_traceable(layer)]
    for layer in layers:  # not the call: hooks around it stay as they are
        layer.forward = torch.compile(layer.forward, backend=options.backend)
    return len(layers)


def _is_traceable(layer: nn.Module) -> bool:
    """False with a recurrent mixer (without experts, its convolution has the only parameter of three dimensions), and where
    a hook keeps what attention needs."""
    return all(parameter.ndim <= 2 for parameter in layer.parameters()) and not needs_hook(layer)


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, in order: what gradient checkpointing would recompute one by one."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
