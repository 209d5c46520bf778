"""Packed sequences through gated-delta-net layers (Qwen3-Next, Qwen3.5) without leaking state across boundaries.

transformers passes the keywords of a forward pass to such a layer's causal convolution and recurrence, but their plain torch
versions know no boundaries. Both are global functions of the modeling module: they are wrapped there, once, and
behave as before without boundaries. The projections around them stay one matrix product over all packed tokens.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("apollo_tp")

Lengths = tuple[int, ...]

_CONVOLUTION, _RECURRENCE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"


def keeps_boundaries(layer: nn.Module) -> bool:
    """True if ``layer`` is one whose convolution and recurrence ``respect_boundaries`` wraps."""
    modeling = sys.modules[type(layer).__module__]
    return hasattr(modeling, _CONVOLUTION) and hasattr(modeling, _RECURRENCE)


def respect_boundaries(module: nn.Module) -> None:
    """Wrap the convolution and the recurrence that the layers of ``module`` use; any number of times."""
    for name in {type(layer).__module__ for layer in module.modules()}:
        modeling = sys.modules[name]
        for function, wrap in ((_CONVOLUTION, _packed_convolution), (_RECURRENCE, _packed_recurrence)):
            original = getattr(modeling, function, None)
            if original is not None and not hasattr(original, "apollo_tp"):
                wrapped = wrap(original)
                wrapped.apollo_tp = True  # type: ignore[attr-defined]
                setattr(modeling, function, wrapped)


def _packed_convolution(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``original`` for packed sequences, whose lengths are among the keywords; as it is without them."""

    @functools.wraps(original)
    def convolve(hidden: Tensor, *args: Any, sequence_lengths: Lengths | None = None, **kwargs: Any) -> Tensor:
        """``hidden`` [1, channels_local, T] to the same shape and dtype, each sequence by itself. Local."""
        if sequence_lengths is None:
            return original(hidden, *args, **kwargs)
        return torch.cat([original(part, *args, **kwargs) for part in hidden.split(sequence_lengths, dim=2)], dim=2)

    return convolve


def _packed_recurrence(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` for packed sequences, whose lengths are among the keywords; as it is without them."""
    kernel = _flash_linear_attention()
    plain = inspect.unwrap(original)  # transformers puts the same kernel in its place if the package is installed

    @torch.compiler.disable  # the kernel is compiled already, and the plain loop over chunks would be unrolled
    @functools.wraps(original)
    def recur(
        *states: Tensor, cu_seqlens: Tensor | None = None, sequence_lengths: Lengths | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """``states`` (query, key, value) [1, T, heads_local, d]; ``g`` and ``beta`` [1, T, heads_local] among the keywords.

        Returns [1, T, heads_local, d], each sequence by itself, and None for the final state. Local.
        """
        if cu_seqlens is None or sequence_lengths is None:
            return original(*states, cu_seqlens=cu_seqlens, **kwargs)  # type: ignore[no-any-return]
        gates = {name: kwargs[name] for name in ("g", "beta")}
        normalize = kwargs.get("use_qk_l2norm_in_kernel", False)
        if kernel is not None and states[0].is_cuda:
            return kernel(  # type: ignore[no-any-return]
                *states,
                **gates,
                use_qk_l2norm_in_kernel=normalize,
                cu_seqlens=cu_seqlens.long(),
                cu_seqlens_cpu=_offsets(sequence_lengths),
            )
        outputs = []
        for *parts, g, beta in zip(
            *(state.split(sequence_lengths, dim=1) for state in (*states, gates["g"], gates["beta"])), strict=True
        ):
            outputs.append(plain(*parts, g=g, beta=beta, use_qk_l2norm_in_kernel=normalize)[0])
        return torch.cat(outputs, dim=1), None

    return recur


@functools.lru_cache(maxsize=8)
def _offsets(lengths: Lengths) -> Tensor:
    """``cu_seqlens`` int64 [S + 1] on the host: without it each layer would wait for the device to count its chunks."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def _flash_linear_attention() -> Callable[..., Any] | None:
    """flash-linear-attention's kernel if that package is installed and its backward pass runs here; else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        return None
    triton = importlib.metadata.version("triton")
    if _backward_is_refused(
        torch.cuda.get_device_capability(), triton, importlib.util.find_spec("tilelang") is not None
    ):
        log.warning(
            "gated delta nets run in plain torch, which is slower: flash-linear-attention has no right backward pass on "
            "Hopper with Triton 3.4 to 3.7.0 (got %s); install tilelang, or Triton 3.7.1 or newer",
            triton,
        )
        return None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule  # type: ignore[no-any-return]


def _backward_is_refused(capability: tuple[int, int], triton: str, tilelang: bool) -> bool:
    """True where flash-linear-attention 0.6 raises in the backward pass (its issue 640) and has nothing to replace it."""
    release = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    return capability[0] == 9 and (3, 4) <= release < (3, 7, 1) and not tilelang
