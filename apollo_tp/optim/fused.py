"""Updates inside the backward pass: hooks on the parameters, and what they did in the step that is under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apollo_tp.errors import ApolloTpError
from apollo_tp.optim.bundle import Bundle
from apollo_tp.optim.interface import Decision
from apollo_tp.optim.weight import Weight


class FusedStep:
    """Hooks that update each of the ``fused`` weights of ``whole`` in a bundle of its own, between ``begin`` and ``finish``.

    At all other times they do nothing, and gradients are stored. Rank for rank the hooks run in the same order, since the
    graphs are the same; each is collective (see Bundle.update).
    """

    def __init__(self, whole: Bundle, fused: Sequence[Weight]) -> None:
        self.tp, self.device = whole.tp, whole.device
        self.names = [weight.name for weight in fused]
        self.rest = whole.part([w for w in whole.weights if w.name not in set(self.names)])
        self._lr: float | None = None
        self._alive = torch.ones((), dtype=torch.bool, device=self.device)
        self._decisions: list[tuple[Bundle, Decision]] = []
        self._done: set[str] = set()
        for weight in fused:
            assert weight.fused_leaf is not None
            part = whole.part([weight])
            weight.fused_leaf.register_post_accumulate_grad_hook(lambda leaf, part=part: self._hook(part, leaf))

    @property
    def begun(self) -> bool:
        """True between ``begin`` and ``finish``."""
        return self._lr is not None

    def begin(self, lr: float, loss: Tensor | None) -> None:
        """The next backward pass updates, unless ``loss`` is not finite on some rank. One all-reduce of one float."""
        self._lr, self._decisions, self._done = lr, [], set()
        bad = torch.zeros((), device=self.device)
        if loss is not None:
            bad = (~torch.isfinite(loss.detach())).float().to(self.device)
        self._alive = self.tp.all_reduce_(bad) == 0

    def _hook(self, part: Bundle, leaf: Tensor) -> None:
        if self._lr is None:
            return
        name = part.weights[0].name
        if name in self._done:
            raise ApolloTpError(
                f"{name}: got a second gradient within a fused step, expected one backward pass for each begin_fused_step; "
                "accumulate with train.gradients=stored"
            )
        decision = part.update(self._lr, None, self._alive)
        self._alive = self._alive & decision.good
        self._decisions.append((part, decision))
        self._done.add(name)
        leaf.grad = None

    def finish(self, lr: float, loss: Tensor | None) -> list[tuple[Bundle, Decision]]:
        """Update what the hooks left, if nothing stopped them; returns all decisions of the step. Collective: see Bundle.

        Raises ApolloTpError if ``lr`` is not the learning rate of ``begin``.
        """
        if self._lr != lr:
            raise ApolloTpError(
                f"step: got learning rate {lr}, expected {self._lr} as in begin_fused_step of this step"
            )
        decisions = [*self._decisions, (self.rest, self.rest.update(lr, loss, self._alive))]
        self.abandon()
        return decisions

    def abandon(self) -> None:
        """Forget the step; the next one stores its gradients unless ``begin`` is called."""
        self._lr, self._decisions, self._done = None, [], set()
