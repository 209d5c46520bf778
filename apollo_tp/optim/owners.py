"""Replicas of a model that are trained together: each parameter has one replica that updates it, its owner.

The gradients of all replicas are summed on the owner alone, which keeps the optimizer's state and writes the weight; the
others get a copy of the result. The bytes are those of an all-reduce of the gradients, state and remainders are divided by
the number of replicas, and replicas are equal because one computes and the others copy.

All of it goes between ranks that hold the same shard, one in each replica: the group ``replicas`` of size R.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, ReplicaError
from apollo_tp.optim.parameters import OptimParameter, leaf_of_complete_gradient
from apollo_tp.optim.replicas import checksums
from apollo_tp.optim.sharding import Decision, DecisionInputs

BUCKET_BYTES = 256 * 2**20
"""Of one owner's gradients or weights in one collective; a larger one has its own. The exchange of an 8B model over two GPUs
takes 22 % longer with 64 MiB (``profile_step.py --replicas 2``)."""
MAX_UNDER_WAY = 2
"""Sums of gradients at a time: one that runs while the next is packed. Each takes R + 1 times BUCKET_BYTES."""


def assign_owners(parameters: Sequence[OptimParameter], num_replicas: int) -> list[int]:
    """The replica that owns each parameter: the largest first, to the replica that has least. The same on all ranks.

    Raises ConfigError if a replica would own nothing.
    """
    if num_replicas > len(parameters):
        raise ConfigError(
            f"replicas: got {num_replicas}, expected at most as many as trained tensors ({len(parameters)}), since each "
            "tensor is updated by one replica"
        )
    owners, held = [0] * len(parameters), [0] * num_replicas
    # sizes are global: shards of one tensor may differ between the ranks of a replica
    sizes = [max(1, torch.Size(p.shard.global_shape).numel()) * p.tensor.element_size() for p in parameters]
    for index in sorted(range(len(parameters)), key=lambda i: (-sizes[i], i)):
        owners[index] = held.index(min(held))
        held[owners[index]] += sizes[index]
    return owners


@dataclass(frozen=True)
class Bucket:
    """Indices of parameters of one dtype, a list for each owner, and the elements of the longest list on this rank."""

    indices: list[list[int]]
    num_elements: int


@dataclass(frozen=True)
class _Sum:
    """The sum of a bucket's gradients on its way: what this rank sends, [R, num_elements + 1], and gets, [1, the same]."""

    bucket: Bucket
    sent: Tensor
    received: Tensor
    work: dist.Work


class Owners:
    """The exchange between owners and the other replicas. ``parameters`` are all trained ones, ``owner`` theirs.

    Buckets are in the order in which the backward pass completes their gradients, and all replicas sum them in this order.
    """

    def __init__(
        self,
        parameters: Sequence[OptimParameter],
        owner: Sequence[int],
        replicas: TPGroup,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """No collective. ``bucket_bytes`` is the same on all ranks."""
        self.parameters, self.owner, self.replicas = list(parameters), list(owner), replicas
        self.buckets = list(self._make_buckets(bucket_bytes))
        # that of a gradient which the backward pass does not complete is None, and stays missing
        self._leaves = [{id(leaf) for leaf in self._leaves_of(bucket)} for bucket in self.buckets]
        leaves = [leaf for bucket in self.buckets for leaf in self._leaves_of(bucket) if leaf is not None]
        for leaf in {id(leaf): leaf for leaf in leaves}.values():
            leaf.register_post_accumulate_grad_hook(self._complete)
        self.abandon()

    def _leaves_of(self, bucket: Bucket) -> list[nn.Parameter | None]:
        return [leaf_of_complete_gradient(self.parameters[i]) for part in bucket.indices for i in part]

    def _make_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """Per dtype: the owners' parameters, cut where one of them has ``bucket_bytes``. First those whose gradients are
        complete in the backward pass, which meets the last layers first."""
        order = sorted(
            range(len(self.parameters)), key=lambda i: (leaf_of_complete_gradient(self.parameters[i]) is None, -i)
        )
        for dtype in dict.fromkeys(p.tensor.dtype for p in self.parameters):
            queues: list[list[list[int]]] = []
            for replica in range(self.replicas.size):
                of_owner = [i for i in order if self.owner[i] == replica and self.parameters[i].tensor.dtype is dtype]
                queues.append(self._cut(of_owner, bucket_bytes))
            for row in range(max(len(queue) for queue in queues)):
                indices = [queue[row] if row < len(queue) else [] for queue in queues]
                longest = max(sum(self.parameters[i].tensor.numel() for i in part) for part in indices)
                yield Bucket(indices, longest)

    def _cut(self, indices: Sequence[int], bucket_bytes: int) -> list[list[int]]:
        parts: list[list[int]] = []
        room = 0
        for i in indices:
            nbytes = self.parameters[i].tensor.nbytes
            if not parts or nbytes > room:
                parts.append([])
                room = bucket_bytes
            parts[-1].append(i)
            room -= nbytes
        return parts

    def begin(self) -> None:
        """The next backward pass is the last one of the step: from now on a bucket is summed once all its gradients are
        complete, and those before it are under way. Local."""
        self._begun = True

    def abandon(self) -> None:
        """Forget the sums of a step that did not end. Local."""
        self._begun, self._launched = False, 0
        self._missing = [set(leaves) for leaves in self._leaves]
        self._under_way: deque[_Sum] = deque()
        self._arrived: list[Tensor] = []
        self._without_gradient: dict[int, Tensor] = {}

    def _complete(self, leaf: Tensor) -> None:
        """A hook in the backward pass. All replicas launch their buckets in one order, whatever order this pass has."""
        if not self._begun:
            return
        for missing in self._missing[self._launched :]:
            missing.discard(id(leaf))
        while self._launched < len(self.buckets) and not self._missing[self._launched]:
            self._launch()

    def sum_gradients(self) -> tuple[dict[int, Tensor], Tensor]:
        """Sum the local gradients over replicas, each on its owner alone, in their dtype; what ``begin`` has left.

        The sums replace the owner's gradients in place. Where its backward pass left none, they are in the dictionary, by
        index, in the local shape. The second value is 1 (fp32 [1]) if each sum has happened on this rank, by the canary
        that it carries, else 0: then the gradients may be anything. Collective: one reduce-scatter per bucket.
        """
        while self._launched < len(self.buckets):
            self._launch()
        while self._under_way:
            self._finish()
        result = self._without_gradient, torch.cat(self._arrived).all().float()[None]
        self.abandon()
        return result

    def _launch(self) -> None:
        """Start the sum of the next bucket, beside which the backward pass goes on; wait for one that began long before."""
        if len(self._under_way) == MAX_UNDER_WAY:
            self._finish()
        bucket = self.buckets[self._launched]
        sent = self._flat_gradients(bucket)
        received, work = self.replicas.start_reduce_scatter(sent)
        self._under_way.append(_Sum(bucket, sent, received, work))
        self._launched += 1

    def _finish(self) -> None:
        """Take what the oldest sum has brought, in the order of the current stream."""
        pending = self._under_way.popleft()
        pending.work.wait()
        total, start = pending.received[0], 0
        self._arrived.append(total[-1:] == self.replicas.size)
        for i in pending.bucket.indices[self.replicas.rank]:
            gradient, shape = self.parameters[i].grad, self.parameters[i].tensor.shape
            summed = total[start : (start := start + shape.numel())].view(shape)
            if gradient is None:
                self._without_gradient[i] = summed
            else:
                gradient.copy_(summed)

    def _flat_gradients(self, bucket: Bucket) -> Tensor:
        """[R, num_elements + 1] in the gradients' dtype: in row r, those that replica r owns, padded, and a canary of 1."""
        flat = self._rows(bucket, self.replicas.size, extra=1)
        for row, indices in zip(flat, bucket.indices, strict=True):
            self._pack(row, {i: self.parameters[i].grad for i in indices})
        flat[:, -1] = 1.0
        return flat

    def publish(self, numbers: Sequence[int] | None = None) -> None:
        """Copy each owner's weights into the memory that the other replicas serve: the buckets of these ``numbers``, or all.
        Collective: one all-gather per bucket and one all-reduce of one number, after which a rank writes what it received
        if all ranks have received it."""
        own = self.replicas.rank
        for bucket in self.buckets if numbers is None else [self.buckets[number] for number in numbers]:
            row = self._rows(bucket, 1)
            self._pack(row[0], self._weights(bucket, own))
            self._write(bucket, self.replicas.all_gather(row), [r for r in range(self.replicas.size) if r != own])

    def fill(self, source: int) -> None:
        """Copy all weights of replica ``source`` to the others. Collective: for each bucket one broadcast, and one
        all-reduce as in ``publish``."""
        for bucket in self.buckets:
            rows = self._rows(bucket, self.replicas.size)
            for replica, row in enumerate(rows):
                self._pack(row, self._weights(bucket, replica))
            self._write(bucket, self.replicas.broadcast_(rows, source), list(range(self.replicas.size)))

    def _rows(self, bucket: Bucket, count: int, extra: int = 0) -> Tensor:
        """Memory [count, num_elements + extra] in the dtype of the bucket's parameters, in which ``_pack`` leaves nothing
        undefined but the ``extra`` elements."""
        like = self.parameters[next(i for part in bucket.indices for i in part)].tensor
        return torch.empty(count, bucket.num_elements + extra, dtype=like.dtype, device=like.device)

    def _weights(self, bucket: Bucket, replica: int) -> dict[int, Tensor | None]:
        """By index, the local weights in ``bucket`` that ``replica`` owns."""
        return {i: self.parameters[i].tensor.data for i in bucket.indices[replica]}

    def _pack(self, row: Tensor, values: Mapping[int, Tensor | None]) -> None:
        """Copy ``values`` (by index, in local shapes) one after the other into ``row``; those that are None, and the rest of
        the row, are zeros."""
        start = 0
        for i, value in values.items():
            place = row[start : (start := start + self.parameters[i].tensor.numel())]
            if value is None:
                place.zero_()
            else:
                place.view(value.shape).copy_(value)
        row[start:].zero_()

    def _write(self, bucket: Bucket, rows: Tensor, owners: Sequence[int]) -> None:
        """Give the weights of these ``owners`` in this bucket what was received in ``rows`` [R, num_elements], but only if
        all replicas have received it. Nothing waits for the device.

        Not received in place: a collective that is aborted writes what it finds (``Aborted``), and inference reads it.
        """
        replicas, device = self.replicas, rows.device
        arrived = replicas.all_reduce_(replicas.intact(device)) * replicas.intact(device) == replicas.size
        for replica in owners:
            start = 0
            for i in bucket.indices[replica]:
                data = self.parameters[i].tensor.data
                received = rows[replica, start : (start := start + data.numel())].view(data.shape)
                torch.where(arrived, received, data, out=data)

    def check_equal(self) -> None:
        """See ``check_equal``, of all parameters."""
        check_equal({p.name: p.tensor.data for p in self.parameters}, self.replicas)


def check_equal(tensors: Mapping[str, Tensor], replicas: TPGroup, labels: Sequence[str] = ()) -> None:
    """Raise ReplicaError on all ranks of ``replicas`` if the bits of a tensor differ between them. ``labels`` name the
    replicas in the message. One all-gather."""
    if replicas.size == 1:
        return
    local = torch.stack([checksums([tensor]) for tensor in tensors.values()])
    rows = replicas.gather_checked(local, "checksums of the replicas' weights")
    differing = (rows != rows[:1]).any(2)
    if not differing.any():
        return
    names, labels = list(tensors), labels or [f"replica {r}" for r in range(replicas.size)]
    found = [f"{names[i]} on {labels[r]}" for r, i in differing.nonzero().tolist()]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise ReplicaError(
        f"replicas: got other bits than on {labels[0]} in {', '.join(found[:3])}{more}, expected equal weights; serve the "
        "same model on all replicas, and start the servers that differ again"
    )


@dataclass(frozen=True)
class Verdict:
    """The decision of one replica: whether all its collectives happened, whether it would write, the squared norm of the
    gradients that it owns, how many parameters it would write, and the largest relative update."""

    checked: bool
    good: bool
    square: float
    num_written: int
    largest: float


_FLOATS = 6
"""Of a verdict on its way: the fields above, and a canary of 1."""


def agree_over_replicas(decision: Decision, inputs: DecisionInputs, before: Tensor, replicas: TPGroup) -> Decision:
    """The decision that writes only if those of all replicas would; else limiter norms are as ``before`` (fp64 [all
    parameters]). Its report is followed by the verdicts of all replicas. Nothing waits for the device.

    Collective over ``replicas``: one all-gather of ``_FLOATS`` numbers.
    """
    checked, _, square = decision.report[:3]
    written, relative = decision.report[3:].view(2, -1)
    one = torch.ones_like(square)
    verdict = torch.stack([checked, decision.good.double(), square, written.sum(), relative.max(), one])
    verdicts = replicas.all_gather(verdict[None])
    verdicts[:, -1] *= replicas.intact(verdicts.device)[0]  # of an aborted one, anything may be left
    everywhere = ((verdicts[:, 1] == 1) & (verdicts[:, -1] == 1)).all()
    inputs.limiter_norms.copy_(torch.where(everywhere, inputs.limiter_norms, before))
    report = torch.cat([decision.report[:3], written * everywhere, relative, verdicts.flatten()])
    return replace(decision, write=decision.write * everywhere, good=decision.good * everywhere, report=report)


def read_verdicts(report: Sequence[float], count: int, num_replicas: int) -> list[Verdict]:
    """What each replica decided, from the report of a decision on ``count`` parameters."""
    if num_replicas == 1:
        largest = max(report[3 + count :], default=0.0)
        return [Verdict(bool(report[0]), True, report[2], int(sum(report[3 : 3 + count])), largest)]
    rows = [report[start : start + _FLOATS] for start in range(3 + 2 * count, len(report), _FLOATS)]
    return [
        Verdict(checked == 1 and canary == 1, good == 1, square, int(written) if good == 1 else 0, largest)
        for checked, good, square, written, largest, canary in rows
    ]
