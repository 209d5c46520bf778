"""The owners' weights reach the other replicas beside the next forward pass: each layer waits for its own.

Until then the other replicas serve what they had, as with ``sync=hogwild`` anyway. On the device only: on a CPU the copy is
made at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apollo_tp.optim.owners import Owners


class LateWeights:
    """Copies of ``owners`` on a stream of their own. ``layers`` are the decoder layers in their order, of the model
    ``module``; ``head`` is what is read behind them, if it is not read before them too."""

    def __init__(self, owners: Owners, module: nn.Module, layers: Sequence[nn.Module], head: Tensor | None) -> None:
        self._owners, device = owners, owners.parameters[0].tensor.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._order, self._needed = stages(owners, layers, head)
        self._events: list[torch.cuda.Event] = []
        self._is_due = False
        self._copy: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.seconds = 0.0
        """How long the copy before the last one took."""
        module.register_forward_pre_hook(lambda *_: self.wait(0))
        for number, layer in enumerate(layers, 1):
            layer.register_forward_pre_hook(lambda *_, number=number: self.wait(number))
        layers[-1].register_forward_hook(lambda *_: self.wait())

    def announce(self) -> None:
        """The owners have new weights, of which ``launch``, or else ``wait``, will start the copy. Local."""
        self.wait()
        self._is_due = True

    def forget(self) -> None:
        """What was announced is not to be copied: only some ranks may have announced it. Local."""
        self._is_due = False

    def launch(self) -> None:
        """As ``Owners.publish``, in the order in which a forward pass reads, of what was announced. Later collectives over
        the replicas wait for it, so those whose results are needed soon come first."""
        if not self._is_due:
            return
        self._is_due = False
        if self._stream is None:
            self._owners.publish(self._order)
            return
        if self._copy is not None and self._copy[1].query():
            self.seconds = self._copy[0].elapsed_time(self._copy[1]) / 1e3
        self._copy = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy[0].record()
            for bucket in self._order:
                self._owners.publish([bucket])
                self._events.append(self._stream.record_event())
            self._copy[1].record()

    def wait(self, stage: int | None = None) -> None:
        """Let the current stream wait until the weights have arrived which are read before the layers (stage 0), up to the
        layer of this number, or all. The host does not wait. Local, unless a copy is still to be launched."""
        self.launch()
        if not self._events:
            return
        count = len(self._order) if stage is None else self._needed[stage]
        if count:
            self._await(count)
        if count == len(self._order):
            self._events = []

    def _await(self, count: int) -> None:
        """For the first ``count`` buckets of the order."""
        torch.cuda.current_stream().wait_event(self._events[count - 1])


def stages(owners: Owners, layers: Sequence[nn.Module], head: Tensor | None) -> tuple[list[int], list[int]]:
    """The numbers of the owners' buckets in the order in which a forward pass needs them, and how many of these are needed
    before the layers, by each layer, and behind them. The same on all replicas. Local."""
    read_by = [[(p.data_ptr(), p.data_ptr() + p.nbytes) for p in layer.parameters()] for layer in layers]
    at_end = [] if head is None else [(head.data_ptr(), head.data_ptr() + head.nbytes)]
    ranges = [*enumerate(read_by, 1), (len(layers) + 1, at_end)]

    def stage(index: int) -> int:
        place = owners.parameters[index].tensor.data_ptr()
        return next((n for n, parts in ranges if any(first <= place < last for first, last in parts)), 0)

    of_bucket = [sorted({stage(i) for part in bucket.indices for i in part}) for bucket in owners.buckets]
    order = sorted(range(len(of_bucket)), key=lambda number: of_bucket[number])
    needed = []
    for current in range(len(layers) + 2):
        reads = [place for place, number in enumerate(order, 1) if of_bucket[number][0] <= current]
        needed.append(max(reads, default=0))
    return order, needed
