"""Ask vLLM's own loader where each checkpoint tensor goes: no rules per layer class.

``model.load_weights`` is called with a *probe* for each checkpoint tensor: a wrapper-subclass tensor of the checkpoint's
shape and dtype, backed by a meta tensor. View operations on it run on the meta tensor and give probes again; copying a
probe into a real tensor is recorded and not executed. Anything else means that the loader transforms the tensor, and it is
refused with that operation as the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from apollo_tp.shards.boxes import Box


@dataclass(frozen=True, slots=True)
class Copy:
    """One recorded copy: ``box`` of the checkpoint tensor was copied to this view (dimensions in checkpoint order)."""

    box: Box
    address: int
    """Address of the destination's first element, in bytes."""
    stride: tuple[int, ...]
    """Destination strides in elements; 0 for dimensions of size one."""


@dataclass(slots=True)
class Trace:
    """The outcome for one checkpoint tensor: where it was copied to, or why it cannot be trained in place."""

    name: str
    copies: list[Copy] = field(default_factory=list)
    served: bool = False
    """Whether the loader copied it, or a part of it. The part is empty on a rank that has only padding of a vocabulary, or
    zeros."""
    zeroed: bool = False
    """Whether the loader has set it to zero before it copied it: this rank serves zeros in its place."""
    refusal: str = ""


class TransformedError(Exception):
    """The loader did something to a probe that is neither a view nor a copy into a parameter."""


class Probe(Tensor):
    """Stands for (a view of) a checkpoint tensor. ``meta`` is that view of a contiguous meta tensor ``root``."""

    meta: Tensor
    root: Tensor
    trace: Trace

    @staticmethod
    def __new__(cls: type[Probe], meta: Tensor, root: Tensor, trace: Trace) -> Probe:
        probe = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device="cpu"
        )
        probe.meta, probe.root, probe.trace = meta, root, trace
        return probe  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], Probe):
            _record(args[0], args[1])
            return args[0]
        probe = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Probe))
        if func is torch.ops.aten.detach.default or func is torch.ops.aten.alias.default:
            return Probe(probe.meta, probe.root, probe.trace)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default) and _changes_nothing(probe, kwargs):
            return Probe(probe.meta, probe.root, probe.trace)
        if func._schema.is_mutable:
            _zero(func, probe)
            return probe
        out = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        if any(not isinstance(leaf, Tensor) or not _is_view(leaf, probe) for leaf in tree_leaves(out)):
            raise TransformedError(f"vLLM's loader applies {func} to it")
        return tree_map(lambda leaf: Probe(leaf, probe.root, probe.trace), out)


def _meta(leaf: Any) -> Any:
    return leaf.meta if isinstance(leaf, Probe) else leaf


def _is_view(leaf: Tensor, probe: Probe) -> bool:
    return leaf.untyped_storage()._cdata == probe.root.untyped_storage()._cdata and leaf.dtype == probe.root.dtype


def _changes_nothing(probe: Probe, kwargs: dict[str, Any]) -> bool:
    """A copy to the same dtype, for example onto the parameter's device: the values stay."""
    return kwargs.get("dtype") in (None, probe.dtype)


def _zero(func: Any, probe: Probe) -> None:
    """Note that the checkpoint tensor is set to zero: a bias that is added before a sum over ranks, on all ranks but one."""
    if func is not torch.ops.aten.zero_.default or probe.meta.numel() != probe.root.numel():
        raise TransformedError(f"vLLM's loader applies {func} to it")
    probe.trace.zeroed = True


def _record(destination: Tensor, probe: Probe) -> None:
    if destination.shape != probe.shape:
        raise TransformedError(f"vLLM's loader broadcasts {tuple(probe.shape)} into {tuple(destination.shape)}")
    box, order = _box_of(probe)
    probe.trace.served = True
    if box.numel and not probe.trace.zeroed:  # empty on a rank that has only padding of a vocabulary
        stride = tuple(0 if d is None else destination.stride(d) for d in order)
        probe.trace.copies.append(Copy(box, destination.data_ptr(), stride))


def _box_of(probe: Probe) -> tuple[Box, list[int | None]]:
    """The box of the root that this view covers, and for each root dimension the dimension of the view that runs along it
    (None if it has size one). Raises TransformedError if the view is not a box."""
    root, view = probe.root, probe.meta
    remaining, offset = view.storage_offset(), []
    for d in range(root.dim()):
        offset.append(remaining // root.stride(d) if root.shape[d] else 0)
        remaining -= offset[-1] * root.stride(d)
    shape = [1] * root.dim()
    order: list[int | None] = [None] * root.dim()
    for v in range(view.dim()):
        if view.shape[v] == 1:
            continue
        matches = [d for d in range(root.dim()) if root.shape[d] > 1 and root.stride(d) == view.stride(v)]
        if len(matches) != 1 or order[matches[0]] is not None:
            raise TransformedError(
                f"vLLM's loader reshapes it to {tuple(view.shape)} with strides {tuple(view.stride())}, "
                "which is not a block of the checkpoint tensor"
            )
        order[matches[0]], shape[matches[0]] = v, view.shape[v]
    if any(o + n > size for o, n, size in zip(offset, shape, root.shape, strict=True)):
        raise TransformedError(f"vLLM's loader reshapes it to {tuple(view.shape)} across its rows")
    return Box(tuple(offset), tuple(shape)), order


class _ParametersStay(TorchDispatchMode):
    """While tracing, served parameters are not written: filling them (padding) does nothing, and any other operation on
    them is an error. A loader that computes with what it has copied would otherwise leave a trace of the copy only."""

    FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and not isinstance(args[0], Probe):
            is_copy_of_probe = any(isinstance(leaf, Probe) for leaf in args[1:])
            if not is_copy_of_probe and args[0].untyped_storage().data_ptr() in self.storages:
                if func not in self.FILLS:
                    raise TransformedError(f"vLLM's loader applies {func} to the parameter that it was copied to")
                return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _modules_stay(model: nn.Module) -> Iterator[None]:
    """Put all parameters and buffers back afterwards: some loaders register a parameter again before they load it, and the
    served one, with its values, must not be lost."""
    kept = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    kept += [(module._buffers, dict(module._buffers)) for module in model.modules()]  # type: ignore[misc]
    try:
        yield
    finally:
        for members, before in kept:
            members.clear()
            members.update(before)


Named = tuple[str, tuple[int, ...], torch.dtype]
Load = Callable[[Iterable[tuple[str, Tensor]]], Any]


def trace_loader(model: nn.Module, tensors: Iterable[Named], load: Load | None = None) -> list[Trace]:
    """Trace ``model.load_weights`` (or ``load``) for each checkpoint tensor (name, global shape, dtype).

    Nothing is written into the model, and its parameters and buffers are the same objects afterwards. A tensor that the
    loader skips has a trace that is neither served nor refused.
    """
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with _modules_stay(model), torch.no_grad(), _ParametersStay(storages):
        return _trace(load or model.load_weights, list(tensors))  # type: ignore[arg-type]


def _trace(load: Load, tensors: list[Named]) -> list[Trace]:
    """Trace all tensors in one call, since each call takes milliseconds however little it is given, and there may be
    thousands of experts. If the call raises, trace both halves separately, until the error is that of one tensor."""
    traces = [Trace(name) for name, _, _ in tensors]
    roots = [torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in tensors]
    try:
        load([(trace.name, Probe(root, root, trace)) for trace, root in zip(traces, roots, strict=True)])
    # Loaders of many models run here, each free to raise what it likes at a name or shape it does not know;
    # whatever it is becomes this tensor's refusal.
    except Exception as error:  # noqa: BLE001
        if len(tensors) > 1:
            middle = len(tensors) // 2
            return _trace(load, tensors[:middle]) + _trace(load, tensors[middle:])
        traces[0].refusal = f"{type(error).__name__}: {error}"
    return traces
