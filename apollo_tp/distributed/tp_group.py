"""The tensor-parallel (TP) group as a value: rank, size, and the collectives over its process group.

Code that needs ranks is given a ``TPGroup``. At size 1 every collective returns its input, so that one process runs the
same code. The only process-wide state here is the table of the groups by their numbers (``group_of``): operators of compiled
code take numbers and tensors, not Python objects.

A collective may never happen: when NCCL's communicators are aborted, work that waits for one runs on with whatever lies in
its memory. So a group is marked as aborted before it is (``Aborted``), which the device looks at where a result matters.
Receive buffers are first filled with what no rank sends (NaN, or the least integer), and a collective whose result matters
carries one more element, a canary, which tells a rank that got nothing, and the others of a rank that sent nothing.
"""

from __future__ import annotations

import datetime
import itertools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.distributed.peer_memory import PeerSums
from apollo_tp.distributed.products import Product, SumOfProducts
from apollo_tp.errors import CollectiveError, DeadlineError

_groups: weakref.WeakValueDictionary[int, TPGroup] = weakref.WeakValueDictionary()
"""Every group of this process by its number."""
DEVICE_SECONDS = 20.0
"""How long the device may take to finish what it runs when a group is left. Nothing that waits for another rank is left by
then."""


class Aborted:
    """Whether the communicators of a group and its subgroups were aborted, as the host and the device see it.

    An aborted NCCL collective of a few KB finds in its buffers what ranks sent in an *earlier* collective, and makes a
    result of that which looks right, canary included (seen on two H200). So this is set before the first communicator is
    aborted, in memory that the device reads when it comes to it.
    """

    def __init__(self) -> None:
        self._intact = torch.ones(1)

    @property
    def is_set(self) -> bool:
        return self._intact.item() == 0

    def set(self) -> None:
        """From any thread."""
        self._intact.zero_()

    def reset(self, on_device: bool) -> None:
        """For new communicators, which find nothing old. Nothing that was launched before may still run."""
        self._intact = torch.ones(1, pin_memory=on_device and torch.cuda.is_available())

    def intact(self, device: torch.device) -> Tensor:
        """See ``TPGroup.intact``."""
        if device.type != "cuda":
            return self._intact.to(device, copy=True)
        from apollo_tp.distributed.peer_kernels import read  # here: a CPU build of torch has no Triton

        return read(self._intact, device)


@dataclass(eq=False)
class TPGroup:
    """Rank and size within a group of trainer ranks, and the process group that joins them (None at size 1).

    A rank that fails leaves the others waiting in a collective. ``dissolve`` wakes them, because it closes the
    connections; ``form`` joins all ranks again. Everything that uses this object then uses the new process group.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    peers: PeerSums = field(default_factory=PeerSums, repr=False)
    """How ``summed_products`` may sum through the memory of a second GPU."""
    on_leave: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called first when this rank leaves the group: ``Alarm.ring``."""
    traffic: Counter[str] = field(default_factory=Counter, repr=False)
    """Payload bytes by kind of collective, those of subgroups included, for tests and benchmarks."""
    aborted: Aborted = field(default_factory=lambda: Aborted(), repr=False)
    """Of this group and all its subgroups."""
    number: int = field(default_factory=itertools.count().__next__, init=False, repr=False)
    _rows: tuple[tuple[int, ...], ...] = field(default=(), init=False, repr=False)
    """The ranks in the default group of each group that was split off together with this one, its own among them; () if this
    is the group of all ranks."""
    _subgroups: dict[tuple[tuple[int, ...], ...], TPGroup] = field(default_factory=dict, init=False, repr=False)
    _options: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Backend and timeout of ``group``, for its subgroups: new_group would give them those of the default group."""
    _before_dissolve: list[weakref.WeakMethod[Callable[[], None]]] = field(default_factory=list, init=False, repr=False)

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
        """The group of these ranks (ascending, of this group). Ranks outside of it get one in which their rank is -1.

        Collective over all ranks of this group, and of the groups that it was split off with, when ``ranks`` are asked for
        first.
        """
        return self if ranks == tuple(range(self.size)) else self.split((ranks,))

    def split(self, parts: tuple[tuple[int, ...], ...]) -> TPGroup:
        """The group of that part (ascending ranks of this group; disjoint, of one size) which this rank is in; one in none
        gets one in which its rank is -1. Collective as ``subgroup``."""
        if parts not in self._subgroups:
            mine = next((part for part in parts if self.rank in part), None)
            rank = -1 if mine is None else mine.index(self.rank)
            size = len(parts[0] if mine is None else mine)
            subgroup = TPGroup(rank, size, traffic=self.traffic, aborted=self.aborted)
            subgroup._rows = tuple(tuple(row[r] for r in part) for row in self._all_rows() for part in parts)
            subgroup._join(self._options)
            self._subgroups[parts] = subgroup
        return self._subgroups[parts]

    def form(self, backend: str, timeout: datetime.timedelta) -> None:
        """Join a new process group over the default group, and new ones for the subgroups. Collective."""
        self.aborted.reset(on_device=backend == "nccl")  # of one rank too: dissolve has set it
        if self.size > 1:
            self._join({"backend": backend, "timeout": timeout})

    def _all_rows(self) -> tuple[tuple[int, ...], ...]:
        return self._rows or (tuple(range(self.size)),)

    def _join(self, options: dict[str, Any]) -> None:
        """Make the process groups of all rows, since each is collective over the default group; keep this rank's."""
        self._options = options
        for row in self._all_rows():
            if len(row) > 1:
                group = dist.new_group(list(row), **options)
                if dist.get_rank() in row:
                    self.group = group
        if self.peers.min_buffer_bytes and options["backend"] == "nccl":
            # now that all ranks are here: with the next sum, a rank would wait for one that fails before it, on the host
            device = torch.device("cuda", torch.cuda.current_device())
            self.peers.reserve(self.rank, self.size, self.group, device, self.peers.min_buffer_bytes)
        for subgroup in self._subgroups.values():
            subgroup._join(options)

    def _all_groups(self) -> Iterator[TPGroup]:
        """This group and the groups that were made of it, of which this rank may not be a member."""
        yield self
        for subgroup in list(self._subgroups.values()):
            yield from subgroup._all_groups()

    def dissolve(self) -> None:
        """Leave this group and its subgroups at once. Not collective: ranks that wait in a collective of theirs fail if it
        is gloo's, and are woken by their ``Alarm`` if it is NCCL's.

        When this returns, the device has finished all that was launched before. Raises DeadlineError if it has not within
        DEVICE_SECONDS: this process must end then, since it may still write.
        """
        self.on_leave()
        # NCCL's abort wakes the device at once, and returns when the graphs that captured its collectives are gone
        aborting = threading.Thread(target=self.abort, name="abort", daemon=True)
        aborting.start()
        _await_device(DEVICE_SECONDS)
        groups = list(self._all_groups())
        for reference in [reference for tp in groups for reference in tp._before_dissolve]:
            if (method := reference()) is not None:
                method()
        aborting.join(DEVICE_SECONDS)
        if aborting.is_alive():
            raise DeadlineError(
                f"got NCCL's communicators still open {DEVICE_SECONDS:.0f} s after the device was idle, expected them to be "
                "aborted; this process ends, since they cannot be left"
            )
        for tp in reversed(groups):
            group, tp.group = tp.group, None
            tp.peers.release()
            if group is not None and group is not dist.group.WORLD and tp.rank >= 0:
                dist.destroy_process_group(group)

    def abort(self) -> None:
        """Let everything that waits on the device for another rank of this group or its subgroups run on, with whatever is
        in its memory: NCCL's collectives and sums through peer memory. gloo's wait on the host, until a rank leaves. From
        any thread. The group can only be left afterwards. Where collectives were captured in CUDA graphs, this returns when
        these are gone (``call_before_dissolve``)."""
        self.aborted.set()  # first: what a collective leaves then must not be taken for its result
        aborting = []
        for tp in self._all_groups():
            tp.peers.abort()
            group = tp.group
            if group is not None and tp.rank >= 0 and dist.get_backend(group) == "nccl":
                # each in a thread: one that waits for its graphs must not keep the others from being woken
                aborting.append(threading.Thread(target=group.abort, name="abort NCCL", daemon=True))
                aborting[-1].start()
        for thread in aborting:
            thread.join()

    def call_before_dissolve(self, method: Callable[[], None]) -> None:
        """Have ``dissolve`` call the bound ``method`` first, as long as its object lives.

        For owners of captured collectives of this group: NCCL neither aborts nor leaves a group while their graphs exist.
        """
        self._before_dissolve.append(weakref.WeakMethod(method))

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce ``tensor`` (any shape and dtype, the same on all ranks) in place and return it. One all-reduce."""
        if self.size > 1:
            self.traffic["all_reduce"] += tensor.nbytes
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Replace ``tensor`` by that of rank ``source`` (same shape and dtype) in place and return it. One broadcast."""
        if self.size > 1:
            self.traffic["broadcast"] += tensor.nbytes
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` [P * n, ...] over the group and return this rank's block of rows [n, ...], which is NaN if the sum
        never happens. One reduce-scatter."""
        if self.size == 1:
            return tensor
        out, work = self.start_reduce_scatter(tensor.contiguous())
        work.wait()
        return out

    def start_reduce_scatter(self, tensor: Tensor) -> tuple[Tensor, dist.Work]:
        """As ``reduce_scatter`` of a contiguous ``tensor``, without waiting: the block, and what to wait for before it is
        read. ``tensor`` must stay as it is until then. The group has several ranks."""
        out = _poisoned(tensor, tensor.shape[0] // self.size)
        self.traffic["reduce_scatter"] += tensor.nbytes
        return out, dist.reduce_scatter_tensor(out, tensor, group=self.group, async_op=True)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the ranks' ``tensor`` [n, ...] (equal shapes) to [P * n, ...], in rank order. If this never happens,
        the result is NaN, or the least integer. One all-gather."""
        if self.size == 1:
            return tensor
        out = _poisoned(tensor, tensor.shape[0] * self.size)
        self.traffic["all_gather"] += out.nbytes
        dist.all_gather_into_tensor(out, tensor.contiguous(), group=self.group)
        return out

    def intact(self, device: torch.device) -> Tensor:
        """1 (fp32 [1], on ``device``) if neither this group nor one that it was made of was aborted before the device comes
        here, else 0. What collectives launched before have left is their result only if it is 1 on all ranks."""
        return self.aborted.intact(device)

    def sum_checked(self, tensor: Tensor, what: str) -> Tensor:
        """The sum of a floating-point ``tensor`` (any shape, the same on all ranks) over the group, in new memory.

        One all-reduce with a canary, which is waited for. Raises CollectiveError, which says ``what``, if it did not happen.
        """
        total = self.all_reduce_(torch.cat([tensor.reshape(-1), tensor.new_ones(1)]))
        self._check(what, total[-1].item(), float(self.size))
        return total[:-1].view(tensor.shape)

    def gather_checked(self, tensor: Tensor, what: str) -> Tensor:
        """The ranks' ``tensor`` [...] (equal shapes) as [P, ...] on the host, in rank order.

        One all-gather with a canary of each rank, which is waited for. Raises CollectiveError, which says ``what``, if it
        did not happen.
        """
        own = torch.cat([tensor.reshape(-1), tensor.new_full((1,), self.rank + 1)])
        rows = self.all_gather(own[None]).cpu()
        for rank, canary in enumerate(rows[:, -1].tolist()):
            self._check(f"{what} of rank {rank}", canary, rank + 1)
        return rows[:, :-1].reshape(self.size, *tensor.shape)

    def _check(self, what: str, got: float, expected: float) -> None:
        """Raise CollectiveError about ``what``, which the device has finished, unless the canary that was received is the
        expected one and nothing was aborted."""
        if got != expected or self.aborted.is_set:
            raise CollectiveError(
                f"{what}: got {got:g}{' of aborted work' * self.aborted.is_set} on rank {self.rank} where {expected:g} was "
                f"expected, since a collective over {self.size} ranks did not happen; another rank raised or ended: see its "
                "log"
            )

    def summed_products(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        alongside: Callable[[], None] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``sum_product`` of the sum of ``a @ b`` over ``pairs``: a [m, k] and b [k, n], local and of one dtype; k may
        differ between pairs."""
        return self.sum_product(SumOfProducts(pairs), alongside, residual)

    def sum_product(
        self, product: Product, alongside: Callable[[], None] | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``product`` [m, n], summed over the ranks, plus ``residual``. One all-reduce.

        ``residual`` [m, n] is the same on all ranks. Returns [m, n] in the product's dtype, the same on all ranks, rounded
        before and after the residual is added. ``alongside`` launches work that runs during the all-reduce; it excludes
        a residual.
        """
        assert alongside is None or residual is None, "no product needs both"
        pending = None
        if self.size > 1:
            num_bytes = product.dtype.itemsize * math.prod(product.shape)
            self.traffic["all_reduce"] += num_bytes
            buffers = self.peers.buffers_for(self.rank, self.size, self.group, product.device, num_bytes)
            if buffers is not None:
                return buffers.sum_product(product, alongside, residual)
        out = product.write(torch.empty(product.shape, dtype=product.dtype, device=product.device))
        if self.size > 1:
            pending = dist.all_reduce(out, group=self.group, async_op=True)
        if alongside is not None:
            alongside()
        if pending is not None:
            pending.wait()
        return out if residual is None else out.add_(residual)


def _poisoned(like: Tensor, rows: int) -> Tensor:
    """[rows, ...] like ``like`` [n, ...], for a collective to write into. Memory that was in use before may contain the very
    result of the step before."""
    poison = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).min
    return like.new_empty((rows, *like.shape[1:])).fill_(poison)


def _await_device(seconds: float) -> None:
    """Wait until the current device has done all that was launched on it. Raises DeadlineError after ``seconds``."""
    if not torch.cuda.is_initialized():
        return
    device = torch.cuda.current_device()
    waiting = threading.Thread(target=torch.cuda.synchronize, args=(device,), name="device-wait", daemon=True)
    waiting.start()  # of a device, there is no wait with a deadline
    waiting.join(seconds)
    if waiting.is_alive():
        raise DeadlineError(
            f"got GPU {device} still busy {seconds:.0f} s after its collectives were aborted, expected it to finish what it "
            "runs; this process ends, since it might write later"
        )


def group_of(number: int) -> TPGroup:
    """The group of this process whose ``number`` this is."""
    return _groups[number]


def compute_group(tp: TPGroup, device: torch.device, timeout_seconds: float) -> None:
    """Form ``tp``'s process group for ``device``: NCCL on CUDA, gloo on CPU. Collective."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    tp.form(backend, datetime.timedelta(seconds=timeout_seconds))
