"""The tensor-parallel (TP) group as a value, and the collectives that autograd sees.

No global state: whoever needs ranks gets a ``TPGroup``. At size 1 every collective is skipped, so that one process runs
the same code. ``traffic`` counts payload bytes per kind of collective, for tests and benchmarks.

A collective may never happen: when NCCL's communicators are aborted, work that waits behind one runs on with whatever lies
in its memory. So receive buffers begin as what no rank sends (NaN, the least integer), and what matters has one more
element, a canary, which is right only if every rank has put its part into it.
"""

from __future__ import annotations

import datetime
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.distributed.peer_memory import MIN_BYTES, PeerSums, add_products, reach_each_other
from apollo_tp.errors import CollectiveError

_P, _R = ParamSpec("_P"), TypeVar("_R")
_library = torch.library.Library("apollo_tp", "DEF")
_groups: weakref.WeakValueDictionary[int, TPGroup] = weakref.WeakValueDictionary()
"""Every group of this process by its number."""


class Recording(Protocol):
    """Recorded work, with collectives in it."""

    def drop(self) -> None:
        """Forget it."""


@dataclass(eq=False)
class TPGroup:
    """Rank and size within a group of trainer ranks, and the process group that joins them (None at size 1).

    A rank that fails leaves the others waiting in a collective. ``dissolve`` wakes them (its connections close), and
    ``form`` joins all again: whoever holds this object goes on with the new process group.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    peer_memory: bool = True
    """Whether two GPUs that reach each other's memory sum products through it (see ``peer_memory``)."""
    traffic: Counter[str] = field(default_factory=Counter, repr=False)
    number: int = field(default_factory=itertools.count().__next__, init=False, repr=False)
    """What the operators of compiled code know this group by: they take no Python objects."""
    peers: PeerSums | None = field(default=None, init=False, repr=False)
    """The memory that sums go through, if any have yet: work that was recorded goes on using it."""
    _peers_reached: bool | None = field(default=None, init=False, repr=False)
    _children: dict[tuple[int, ...], TPGroup] = field(default_factory=dict, repr=False)
    _options: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Backend and timeout of ``group``, which its parts share: new_group would take those of the default group."""
    recordings: weakref.WeakSet[Recording] = field(default_factory=weakref.WeakSet, repr=False)
    """What was recorded with collectives of this group: NCCL would wait for its end before it leaves a group."""

    def __post_init__(self) -> None:
        _groups[self.number] = self

    @classmethod
    def single(cls) -> TPGroup:
        """The group of one process, for reference runs."""
        return cls(rank=0, size=1)

    @classmethod
    def world(cls, backend: str, timeout: datetime.timedelta) -> TPGroup:
        """A group of its own over all ranks of the initialised default group. Collective."""
        tp = cls(dist.get_rank(), dist.get_world_size())
        tp.form(backend, timeout)
        return tp

    def subgroup(self, ranks: tuple[int, ...]) -> TPGroup:
        """The part of this group with these ranks (ascending). Collective over the whole group; outsiders have rank -1."""
        if ranks == tuple(range(self.size)):
            return self
        if ranks not in self._children:
            child = TPGroup(ranks.index(self.rank) if self.rank in ranks else -1, len(ranks), traffic=self.traffic)
            members = dist.get_process_group_ranks(self.group)
            child.group = dist.new_group([members[r] for r in ranks], **self._options)
            self._children[ranks] = child
        return self._children[ranks]

    def dissolve(self) -> None:
        """Leave this group and its parts at once; peers that wait in a collective of them fail. Not collective."""
        for recording in self.recordings:
            recording.drop()
        for tp in (*self._children.values(), self):
            group, tp.group, tp.peers = tp.group, None, None
            if group is not None and group is not dist.group.WORLD and tp.rank >= 0:
                dist.destroy_process_group(group)

    def form(self, backend: str, timeout: datetime.timedelta) -> None:
        """Join a new process group over the default group, and new ones for the parts. Collective."""
        if self.size == 1:
            return
        self._options = {"backend": backend, "timeout": timeout}
        self.group = dist.new_group(**self._options)
        for ranks, child in self._children.items():
            child.group = dist.new_group(list(ranks), **self._options)

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce ``tensor`` over the group, in place; returns it. One all-reduce."""
        if self.size > 1:
            self.traffic["all_reduce"] += tensor.nbytes
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's ``tensor`` on all ranks, in place; returns it. One broadcast."""
        if self.size > 1:
            self.traffic["broadcast"] += tensor.nbytes
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def summed_products(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        beside: Callable[[], None] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The sum of ``a @ b`` [m, n] over ``pairs`` and over the group, then plus ``residual`` [m, n]: one all-reduce,
        beside what ``beside`` launches. Rounded to the tensors' dtype before and after the residual."""
        assert beside is None or residual is None, "no product needs both"
        (a, b), *_ = pairs
        num_bytes = a.dtype.itemsize * a.shape[0] * b.shape[1]
        pending = None
        if self.size > 1:
            self.traffic["all_reduce"] += num_bytes
            peers = self._peers_for(a.device, num_bytes)
            if peers is not None:
                return peers.summed_products(pairs, beside, residual)
        product = add_products(pairs, torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device))
        if self.size > 1:
            pending = dist.all_reduce(product, group=self.group, async_op=True)
        if beside is not None:
            beside()
        if pending is not None:
            pending.wait()
        return product if residual is None else product.add_(residual)

    def settle(self) -> None:
        """At the edges of work that is recorded and replayed: what comes next may begin with either half of ``peers``."""
        if self.peers is not None:
            self.peers.settle()

    def restart_sums(self) -> None:
        """All ranks, after a recording that failed on some: each has counted the sums that it came to, and a rank that
        then takes the other half of ``peers`` reads what nobody wrote."""
        if self.peers is not None:
            self.peers.restart()

    def _peers_for(self, device: torch.device, num_bytes: int) -> PeerSums | None:
        """Memory for sums of ``num_bytes``, made when first needed; None where NCCL or gloo do better. Collective."""
        if (
            device.type != "cuda"
            or self.size != 2
            or num_bytes < MIN_BYTES
            or self.group is None
            or not self.peer_memory
        ):
            return None
        if self._peers_reached is None:
            self._peers_reached = reach_each_other(self.group, device)
        if self._peers_reached and (self.peers is None or self.peers.num_bytes < num_bytes):
            torch.cuda.synchronize(device)  # what is in flight may use the memory that is replaced
            self.peers = None
            self.peers = PeerSums(self.rank, self.group, 1 << (num_bytes - 1).bit_length())
        return self.peers

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum a contiguous (size * n, ...) tensor over the group and return this rank's (n, ...) block of rows, which is
        NaN if the sum never happens."""
        if self.size == 1:
            return tensor
        out = _poisoned(tensor, tensor.shape[0] // self.size)
        self.traffic["reduce_scatter"] += tensor.nbytes
        dist.reduce_scatter_tensor(out, tensor.contiguous(), group=self.group)
        return out

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate equal (n, ...) tensors of all ranks along dim 0 into (size * n, ...): NaN, or the least integer, if it
        never happens."""
        if self.size == 1:
            return tensor
        out = _poisoned(tensor, tensor.shape[0] * self.size)
        self.traffic["all_gather"] += out.nbytes
        dist.all_gather_into_tensor(out, tensor.contiguous(), group=self.group)
        return out

    def sum_checked(self, tensor: Tensor, what: str) -> Tensor:
        """The sum of a floating-point ``tensor`` over the group, in new memory. One all-reduce with a canary, which is
        waited for. Raises CollectiveError, which says ``what``, if it did not happen."""
        total = self.all_reduce_(torch.cat([tensor.reshape(-1), tensor.new_ones(1)]))
        self._check(what, total[-1].item(), float(self.size))
        return total[:-1].view(tensor.shape)

    def gather_checked(self, tensor: Tensor, what: str) -> Tensor:
        """Equal tensors (...) of all ranks as (size, ...), on the host. One all-gather with a canary of each rank, which is
        waited for. Raises CollectiveError, which says ``what``, if it did not happen."""
        own = torch.cat([tensor.reshape(-1), tensor.new_full((1,), self.rank + 1)])
        rows = self.all_gather(own[None]).cpu()
        for rank, canary in enumerate(rows[:, -1].tolist()):
            self._check(f"{what} of rank {rank}", canary, rank + 1)
        return rows[:, :-1].reshape(self.size, *tensor.shape)

    def _check(self, what: str, got: float, expected: float) -> None:
        if got != expected:
            raise CollectiveError(
                f"{what}: got {got:g} on rank {self.rank} where {expected:g} was expected, since a collective over "
                f"{self.size} ranks did not happen; another rank raised or ended, see its log"
            )


def _poisoned(like: Tensor, rows: int) -> Tensor:
    """(rows, ...) for a collective to write into. Memory that was in use before may hold the very result of the step
    before."""
    poison = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).min
    return like.new_empty((rows, *like.shape[1:])).fill_(poison)


def group_of(number: int) -> TPGroup:
    """The group of this process with this number."""
    return _groups[number]


def operator(schema: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function an operator ``apollo_tp::name`` that compiled code runs as it is; returns the operator. Its result
    must not share memory with its arguments: ``torch.library.custom_op`` would check that in every call, in the time of
    the host that feeds the device."""

    def define(function: Callable[_P, _R]) -> Callable[_P, _R]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.apollo_tp, name).default  # type: ignore[no-any-return]

    return define


def compute_group(tp: TPGroup, device: torch.device, timeout_seconds: float) -> None:
    """Form ``tp``'s process group for ``device``: NCCL on CUDA, gloo on CPU. Collective."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    tp.form(backend, datetime.timedelta(seconds=timeout_seconds))
