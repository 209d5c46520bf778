"""A model is tried out before its first step: whether it runs, whether packed sequences stay apart, and whether its layers
see what transformers' own masks would let them see.

Real steps have no masks: transformers makes none for an attention that it does not know, and a layer says by keyword how
wide its window is. Some layers say nothing and leave the window to the mask. So the model runs once more with an attention
under another name, for which transformers does make masks, and each is compared with what its layer said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.attention import packed_attention
from apollo_tp.model.batch import PackedBatch, pack
from apollo_tp.model.bound import final_hidden_states
from apollo_tp.model.boundaries import BoundariesMissingError, hand_boundaries_to
from apollo_tp.model.build import refusing
from apollo_tp.wire.commands import Sample

NAME = "apollo_packed_with_masks"
_LENGTHS = (3, 2)
_FAR = 1 << 20
"""A distance between tokens beyond the windows that models have."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' form of a mask: (batch, head, query, key), int64 0-d each, to whether the query sees the key."""


@dataclass
class _Seen:
    """What layers gave their attention in the trial with masks: (layer, its mask or None, its window), and what each mask is
    made of, by the id of its tensor, which ``masks`` keeps alive."""

    calls: list[tuple[nn.Module, Tensor | None, int | None]] = field(default_factory=list)
    masks: dict[int, tuple[Tensor, MaskFunction]] = field(default_factory=dict)


_seen = _Seen()
"""Of the trial that is under way; one at a time in a process. transformers calls what is registered by name."""


def try_out(module: PreTrainedModel) -> int:
    """Run short sequences through the module, so that what would fail or go wrong in each step is refused when it is bound.
    Returns the widest window of a layer's attention, in tokens; 0 if none has one.

    Before anything is compiled. Collective: the sums of two forward passes and, for one, of the backward pass to its
    embeddings. Raises UnsupportedModelError.
    """
    with refusing(f"{type(module).__name__}: its forward pass over two packed sequences failed"):
        try:
            reached = _gradient_of_embeddings(module, _trial(module, _LENGTHS))
        except BoundariesMissingError as missing:  # the same on all ranks
            hand_boundaries_to(module, missing.owner)
            reached = _gradient_of_embeddings(module, _trial(module, _LENGTHS))
    if reached[: _LENGTHS[0]].any():
        raise UnsupportedModelError(
            f"{type(module).__name__}: got final hidden states that depend on the sequence before in the pack, expected "
            "each sequence by itself; one of its layers has no version here that keeps packed sequences apart"
        )
    if reached[_LENGTHS[0] + 1 :].any():
        raise UnsupportedModelError(
            f"{type(module).__name__}: got final hidden states that depend on later tokens, expected causal layers"
        )
    with refusing(f"{type(module).__name__}: its forward pass with masks failed"), torch.no_grad(), _with_masks(module):
        final_hidden_states(module, _trial(module, (sum(_LENGTHS),)))
    _compare(module, _seen)
    return max((window for _, _, window in _seen.calls if window), default=0)


def _trial(module: nn.Module, lengths: tuple[int, ...]) -> PackedBatch:
    """Packed sequences of these lengths, on the device of the parameters."""
    samples = [Sample([0] * length, [0.0] + [1.0] * (length - 1)) for length in lengths]
    return pack(samples, sum(lengths))[0].to(next(module.parameters()).device)


def _gradient_of_embeddings(module: PreTrainedModel, trial: PackedBatch) -> Tensor:
    """[T, D]: the gradient of the final hidden states of the second sequence's first token, in some direction, with respect
    to the embeddings. It is exactly zero where a token has no influence. The parameters' gradients stay as they are."""
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # some models scale it in place

    parameters = [p for p in module.parameters() if p.requires_grad]
    hook = module.get_input_embeddings().register_forward_hook(keep)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            hidden = final_hidden_states(module, trial)[trial.lengths[0]]
            direction = torch.linspace(-1.0, 2.0, hidden.numel(), device=hidden.device, dtype=hidden.dtype)
            (gradient,) = torch.autograd.grad((hidden * direction).sum(), embedded[0])
    finally:
        hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)
    return gradient[0]


@contextlib.contextmanager
def _with_masks(module: PreTrainedModel) -> Iterator[None]:
    """In this block transformers makes masks for ``module``, and what its layers give their attention is noted."""
    _seen.calls.clear()
    _seen.masks.clear()
    configs = {id(config): config for m in module.modules() if (config := getattr(m, "config", None)) is not None}
    names = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = names[key]


def _note_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: MaskFunction, device: torch.device, **_: Any
) -> Tensor:
    """As transformers' mask interfaces; the mask, bool [1, 1, q_length, kv_length], is all true, a mere token of itself."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    _seen.masks[id(mask)] = mask, mask_function
    return mask


def _note_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """As ``packed_attention``, which gets no mask; notes this one."""
    _seen.calls.append((module, attention_mask, others.get("sliding_window")))
    return packed_attention(module, query, key, value, None, **others)


def _compare(module: PreTrainedModel, seen: _Seen) -> None:
    """Raise UnsupportedModelError, listing all, for layers whose mask is not what they said to their attention, and for a
    window in the config that no layer knows of."""
    names = {id(layer): name for name, layer in module.named_modules()}
    wrong = []
    for layer, mask, window in seen.calls:
        function = seen.masks[id(mask)][1] if id(mask) in seen.masks else None
        if (reason := _difference(function, window, mask is None)) is not None:
            wrong.append(f"{names[id(layer)]} ({type(layer).__name__}): {reason}")
    configured = _configured_window(module)
    if not wrong and configured is not None and not any(window is not None for _, _, window in seen.calls):
        wrong.append(f"the config has a window of {configured} tokens, of which no layer tells its attention")
    if wrong:
        raise UnsupportedModelError(
            f"{type(module).__name__}: got attention that would see other tokens here than by its config, expected each "
            "layer to name its window; serve another model, or this one without its window (--hf-overrides) if it was "
            "trained so:\n  " + "\n  ".join(wrong)
        )


def _configured_window(module: PreTrainedModel) -> int | None:
    """The window that the config demands of at least one layer, or None."""
    config = module.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False or (types and "sliding_attention" not in types):
        return None
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _difference(function: MaskFunction | None, window: int | None, without: bool) -> str | None:
    """How the mask ``function`` differs from causal attention with this ``window``; None if it does not.

    Looked at from a token far from the start: its future, itself, both sides of the window, and the start.
    """
    if without:
        return "it gives its attention no mask, so that it would see later tokens in transformers"
    if function is None:
        return "it changes the mask that it is given"
    zero, query = torch.tensor(0), torch.tensor(_FAR + (window or 0))
    distances = [-1, 0, 1, _FAR] + ([window - 1, window, window + 1] if window else [])
    for distance in distances:
        expected = distance >= 0 and (window is None or distance < window)
        try:
            sees = bool(function(zero, zero, query, query - distance))
        except IndexError:  # a table by position, made for the tokens of this trial
            return "its mask depends on which tokens there are"
        if sees != expected and window is None and distance == _FAR:
            return "its mask has a window, of which it does not tell its attention"
        if sees != expected:
            can = "sees" if sees else "does not see"
            told = "no window" if window is None else f"a window of {window} tokens"
            return f"it tells its attention of {told}; by its mask a token {can} another one {distance} before it"
    return None


AttentionInterface.register(NAME, _note_call)
AttentionMaskInterface.register(NAME, _note_mask)
