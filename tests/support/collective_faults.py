"""Collectives of this process that leave in their output what an aborted communicator may leave there."""

# What looks right is not invented: aborted NCCL collectives of a few KB combine what this rank sends with what the others
# sent in an earlier collective, canaries included.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.distributed.tp_group import TPGroup

LEAVES = {
    "what was there": lambda out: out,
    "NaN": lambda out: out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max),
    "zeros": lambda out: out.zero_(),
    "large numbers": lambda out: out.fill_(1e30 if out.is_floating_point() else torch.iinfo(out.dtype).max // 2),
    "noise": lambda out: out.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * 100),
    "what looks right": None,
}
"""What a collective that never happened may leave in its output. What was there is what the memory held in the step before:
see ``Collectives``. What looks right are the very values that it would have had; the group is then marked as aborted, by
which alone it can be told."""


class Collectives:
    """Counts the collectives of this process. That of number ``at`` leaves here what ``leave`` makes of its output; the
    other ranks need not notice. New memory holds what a collective wrote last into memory of its shape, as allocators
    give it."""

    def __init__(self, tp: TPGroup) -> None:
        self.tp, self.aborts = tp, False
        self.count, self.at, self.leave = 0, -1, LEAVES["what was there"]
        self.log: list[str] = []
        last: dict[torch.Size, Tensor] = {}
        new_empty = Tensor.new_empty

        def recycled(like: Tensor, *args: object, **kwargs: object) -> Tensor:
            out = new_empty(like, *args, **kwargs)
            known = last.get(out.shape)
            return out if known is None or known.dtype != out.dtype else out.copy_(known)

        def wrap(name: str) -> None:
            real = getattr(dist, name)

            def collective(out: Tensor, *args: object, **kwargs: object) -> object:
                self.count += 1
                self.log.append(f"{name} {kwargs.get('op', '')}")
                if self.count - 1 == self.at:
                    if self.aborts or self.leave is None:
                        self.tp.aborted.set()
                    if self.leave is None:
                        return real(out, *args, **kwargs)
                    done = real(out.clone(), *args, **kwargs)
                    self.leave(out)
                    return done
                done = real(out, *args, **kwargs)
                if name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
                    if isinstance(done, dist.Work):
                        done.wait()
                    last[out.shape] = out.clone()
                return done

            setattr(dist, name, collective)

        Tensor.new_empty = recycled  # type: ignore[assignment, method-assign]
        for name in ("all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor"):
            wrap(name)

    @contextmanager
    def fault(self, at: int, leave: str, here: bool, aborts: bool = False) -> Iterator[None]:
        """The ``at``-th collective from here on; ``aborts``: the group is marked as aborted, whatever it leaves."""
        self.at, self.leave, self.aborts = (self.count + at if here else -1), LEAVES[leave], aborts
        try:
            yield
        finally:
            self.at = -1
            self.tp.aborted.reset(on_device=False)
