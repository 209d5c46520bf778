"""Give inference its share of a GPU's time: the trainer works in bursts, and sleeps between them.

Two processes without MPS are time-sliced, and a decode step competes with whatever the trainer has queued. A burst is
one decoder layer's forward or backward work, the head's, or the optimizer's; its length decides how long the GPU is
left to the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model.compiled import decoder_layers


class Pace:
    """Keeps the GPU busy for at most ``share`` of the time, a number in (0, 1]; at 1 nothing is hooked and nothing waits.

    Hooks the decoder layers of ``module``. Neither values nor their order change. ``clock`` and ``sleep`` take seconds.
    """

    def __init__(
        self,
        share: float,
        module: nn.Module,
        tp: TPGroup,
        device: torch.device,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rest = 1 / share - 1
        self._tp, self._device = tp, device
        self._clock, self._sleep = clock, sleep
        self._suspended = False
        self._start = clock()
        if self._rest:
            for layer in decoder_layers(module):
                layer.register_forward_hook(self._after_forward)

    @property
    def rests(self) -> bool:
        """Whether the trainer sleeps at all."""
        return self._rest > 0

    def begin(self) -> None:
        """A command begins: what happened before it was not the trainer's work. Ends ``suspend``."""
        self._suspended = False
        self._start = self._clock()

    def suspend(self) -> None:
        """Do not sleep until the next ``begin``: the server is paused, and sleeping would only pause it for longer."""
        self._suspended = True

    def give_way(self) -> None:
        """End a burst: wait for the device, then sleep. Collective over the ranks: one all-reduce of one float.

        All sleep in proportion to the shortest burst of all: the rank that woke last has not waited inside the layer's
        sums, so its burst is only work. If each slept for its own, a lag between two ranks would grow by a factor of 1
        / share - 1 with every burst.
        """
        if not self._rest or self._suspended:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        busy = self._clock() - self._start
        if self._tp.size > 1:
            own = torch.tensor(busy, dtype=torch.float32)
            found = self._tp.all_reduce_(own.to(self._device, copy=True), dist.ReduceOp.MIN).item()
            # in the precision that was sent, so that all ranks sleep equally; it may be anything if the sum was aborted
            busy = found if 0 <= found <= own.item() else own.item()
        self._sleep(busy * self._rest)
        self._start = self._clock()

    def _after_forward(self, layer: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        self.give_way()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:  # its gradient exists once the backward pass of the layers above is over
            hidden.register_hook(self._before_backward)

    def _before_backward(self, gradient: Tensor) -> None:
        self.give_way()
