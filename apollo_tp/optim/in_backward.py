"""Updates inside the backward pass: hooks on the parameters, and what they did in the step that is under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from apollo_tp.errors import ApolloTpError
from apollo_tp.optim.parameters import Weight
from apollo_tp.optim.sharding import Decision
from apollo_tp.optim.update_group import UpdateGroup

BUCKET_BYTES = 512 * 2**20
"""Gradients are updated, and freed, together as soon as they come to about this size: two layers of an 8B model at TP = 2.
An update costs the host some milliseconds, which many small ones would add up to more than the backward pass."""


class _Bucket:
    """Leaves whose matrices are updated together, in an update group of their own, once all have their gradient."""

    def __init__(self, group: UpdateGroup, leaves: Sequence[nn.Parameter]) -> None:
        self.group, self.leaves = group, list(leaves)
        self.arrived: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every leaf has its gradient."""
        return len(self.arrived) == len(self.leaves)

    def release(self) -> None:
        """Free the gradients."""
        self.arrived = set()
        for leaf in self.leaves:
            leaf.grad = None


class InBackwardStep:
    """Hooks that update ``weights`` of the group ``parent``, bucket by bucket, between ``begin`` and ``finish``.

    ``weights`` has all weights of a leaf or none; ``names`` are theirs, and ``rest`` is the group of all others. At all
    other times the hooks do nothing, and gradients are stored. All ranks run the hooks in the same order, since their
    graphs are the same; each bucket's update is collective (see UpdateGroup.update).
    """

    def __init__(self, parent: UpdateGroup, weights: Sequence[Weight]) -> None:
        self.tp, self.device = parent.tp, parent.device
        self.names = [weight.name for weight in weights]
        self.rest = parent.subset([w for w in parent.weights if w.name not in set(self.names)])
        self._lr: float | None = None
        self._alive = self._received = torch.ones(1, device=self.device)
        self._decisions: list[tuple[UpdateGroup, Decision]] = []
        self._done: set[int] = set()
        # the backward pass meets the last layers first
        self._buckets = [_Bucket(parent.subset(bucket), leaves) for bucket, leaves in _cut(list(reversed(weights)))]
        for bucket in self._buckets:
            for leaf in bucket.leaves:
                leaf.register_post_accumulate_grad_hook(lambda leaf, bucket=bucket: self._hook(bucket, leaf))

    @property
    def groups(self) -> list[UpdateGroup]:
        """The update groups of a step, in the order of their updates."""
        return [*(bucket.group for bucket in self._buckets), self.rest]

    @property
    def begun(self) -> bool:
        """True between ``begin`` and ``finish``."""
        return self._lr is not None

    def begin(self, lr: float, loss: Tensor | None) -> None:
        """The next backward pass updates, unless ``loss`` (0-d) is not finite on some rank. One all-reduce of two floats."""
        self.abandon()
        self._lr = lr
        sums = torch.ones(2, device=self.device)  # whose loss is finite, and who takes part
        if loss is not None:
            sums[0] = torch.isfinite(loss.detach()).float()
        self._alive, self._received = (self.tp.all_reduce_(sums) == self.tp.size).float().split(1)

    def _hook(self, bucket: _Bucket, leaf: Tensor) -> None:
        if self._lr is None:
            return
        if id(leaf) in self._done:
            raise ApolloTpError(
                f"{bucket.group.weights[0].name}: got a second gradient within a step that updates in the backward pass, "
                "expected one backward pass for each begin_step_in_backward; accumulate with train.gradients=stored"
            )
        self._done.add(id(leaf))
        bucket.arrived.add(id(leaf))
        if bucket.complete:
            self._update(bucket, self._lr)

    def _update(self, bucket: _Bucket, lr: float) -> None:
        decision = bucket.group.update(lr, None, self._alive, self._received)
        self._alive = self._alive * decision.good
        self._decisions.append((bucket.group, decision))
        bucket.release()

    def finish(self, lr: float, loss: Tensor | None, received: Tensor | None) -> list[tuple[UpdateGroup, Decision]]:
        """Update what the hooks left, if nothing stopped them; returns all decisions of the step. Collective: see
        UpdateGroup.update, ``received`` too.

        Raises ApolloTpError if ``lr`` is not the learning rate of ``begin``.
        """
        if self._lr != lr:
            raise ApolloTpError(
                f"step: got learning rate {lr}, expected {self._lr} as in begin_step_in_backward of this step"
            )
        if received is not None:
            self._received = self._received * received
        for bucket in self._buckets:
            if bucket.arrived:  # some of its leaves had no part in the loss
                self._update(bucket, lr)
        decisions = [*self._decisions, (self.rest, self.rest.update(lr, loss, self._alive, self._received))]
        self._decisions = []  # the caller counts them
        self.abandon()
        return decisions

    def abandon(self) -> None:
        """Forget a step that did not end; gradients are stored until the next ``begin``.

        What it has written counts: the moments have moved, and the next bias correction and random bits must follow.
        """
        for group, decision in self._decisions:
            group.accept(decision.written())
        self._lr, self._decisions, self._done = None, [], set()
        for bucket in self._buckets:
            bucket.arrived = set()


def by_leaf(weights: Sequence[Weight]) -> list[tuple[nn.Parameter, list[Weight]]]:
    """The weights of each leaf that may be updated in a hook, in the order in which leaves first occur."""
    found: dict[int, tuple[nn.Parameter, list[Weight]]] = {}
    for weight in weights:
        leaf = weight.leaf_in_backward
        if leaf is not None:
            found.setdefault(id(leaf), (leaf, []))[1].append(weight)
    return list(found.values())


def names_of_complete_leaves(weights: Sequence[Weight]) -> set[str]:
    """Names of those weights whose leaf has no elements but these weights'."""
    return {
        weight.name
        for leaf, members in by_leaf(weights)
        if sum(w.data.numel() for w in members) == leaf.numel()
        for weight in members
    }


def _cut(weights: Sequence[Weight]) -> Iterator[tuple[list[Weight], list[nn.Parameter]]]:
    """Buckets of whole leaves in this order. Sizes are those of an even share, so that all ranks cut at the same places."""
    bucket: list[Weight] = []
    leaves: list[nn.Parameter] = []
    size = 0.0
    for leaf, members in by_leaf(weights):
        need = sum(w.mean_gradient_bytes for w in members)
        if bucket and size + need > BUCKET_BYTES:
            yield bucket, leaves
            bucket, leaves, size = [], [], 0.0
        bucket, leaves, size = bucket + members, [*leaves, leaf], size + need
    if bucket:
        yield bucket, leaves
