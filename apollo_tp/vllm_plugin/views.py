"""Tensors that vLLM makes from weights once they are loaded, such as the absorbed matrices of multi-head latent attention.

Of an unquantised weight they are views: a change of the weight in place is a change of theirs, and nothing else has to be
written. What is a copy would keep the old values, and is refused (``compat.refusals``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``module`` itself and of its attention backend (``impl``), by the names of their attributes, whether
    they are registered or plain."""
    for owner in (module, getattr(module, "impl", None)):
        if owner is not None:
            registered = getattr(owner, "_parameters", {}) | getattr(owner, "_buffers", {})
            members = (registered | vars(owner)).items()
            yield from ((name, value) for name, value in members if isinstance(value, Tensor) and value.numel())


def is_view(tensor: Tensor, weight: Tensor) -> bool:
    """Whether ``tensor`` is a part of ``weight``, or all of it in another order: within its memory, and of its dtype."""
    if tensor.dtype != weight.dtype or tensor.device != weight.device or tensor.numel() > weight.numel():
        return False
    (start, stop), (first, last) = _bytes(tensor), _bytes(weight)
    return first <= start and stop <= last


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte, and of the one after the last."""
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()


def without_views(parameters: Sequence[Tensor]) -> list[Tensor]:
    """``parameters`` without those that are smaller parts of another one, in their order. None is empty."""
    views, outer = set[int](), None
    for parameter in sorted(parameters, key=lambda p: (p.data_ptr(), -p.numel())):
        if outer is not None and parameter.numel() < outer.numel() and is_view(parameter, outer):
            views.add(id(parameter))
        else:
            outer = parameter
    return [parameter for parameter in parameters if id(parameter) not in views]


def owners(tensors: Iterable[Tensor], parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Each of ``tensors`` that is a view of one of ``parameters``, and not that itself, with the latter's index."""
    order = sorted(range(len(parameters)), key=lambda i: parameters[i].data_ptr())
    starts, own = [parameters[i].data_ptr() for i in order], {id(parameter) for parameter in parameters}
    for tensor in tensors:
        position = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        if position >= 0 and id(tensor) not in own and is_view(tensor, parameters[order[position]]):
            yield tensor, order[position]
