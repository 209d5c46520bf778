"""Steps alike, one after the other: their forward and backward pass is recorded once as a CUDA graph, then replayed.

A micro-batch starts some thousand kernels, and the host takes about as long to start them as the device to run them; a
replay is one call. What is recorded holds for micro-batches of one structure (lengths of sequences, number of loss tokens):
a step whose micro-batches are not all alike, and like those of the step before, runs as usual. So do the first steps of a
structure where recordings have not paid before.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.model import BoundModel
from apollo_tp.model.batch import PackedBatch
from apollo_tp.model.loss import unit

log = logging.getLogger(__name__)

Gradients = list[Tensor | None]
WORTHWHILE = 8
"""Replayed steps that make up for a recording. After one with fewer, twice as many in a row must be alike for the next."""


class Passes(Protocol):
    """A recorded forward and backward pass over a batch whose tensors stay where they are, as all results do: ``loss`` and
    ``correct`` of LossSums, and ``gradients`` of ``BoundModel.leaves``."""

    loss: Tensor
    correct: Tensor
    gradients: Gradients

    def replay(self, between: Callable[[], None]) -> None:
        """``between`` is called behind the start of the forward pass and before that of the backward pass."""

    def idle_bytes(self) -> int:
        """Memory that only a replay uses, and that nobody else can have."""


class CudaPasses:
    """Passes as two CUDA graphs: the device begins with the forward pass while the host still launches the other. Behind
    ``before``, of the same batch, they add to its gradients and use its memory.

    Recording runs nothing. Raises RuntimeError for work that cannot be recorded (one that waits for the device, say), and
    where memory is short.
    """

    def __init__(self, model: BoundModel, batch: PackedBatch, before: CudaPasses | None) -> None:
        tp, one = model.tp, unit(batch.token_ids.device)
        traffic = Counter(tp.traffic)
        self._pool = torch.cuda.graph_pool_handle() if before is None else before._pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        assign(model, [None] * len(model.leaves) if before is None else before.gradients)
        gc.collect()  # now, rather than while CUDA's calls are recorded
        with self._recording():
            tp.settle()  # what ran before may have left off at either half of the peers' memory
            sums = model.forward_loss(batch)
        with self._recording():
            sums.loss.backward(one)
            tp.settle()
        self.loss, self.correct = sums.loss.detach(), sums.correct
        self.gradients = [leaf.grad for leaf in model.leaves]
        self._peers = tp.peers  # the graph reads their memory
        self._tp, self._traffic = tp, tp.traffic - traffic

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        confined = stream != torch.cuda.default_stream()  # to some SMs (sm_share), as are replays of what it records
        # A recording that fails would leave its stream the current one. Threads that watch over NCCL ask for events
        # meanwhile, which is no part of it.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(
                graph, pool=self._pool, stream=stream if confined else None, capture_error_mode="thread_local"
            ),
        ):
            yield
        self._graphs.append(graph)

    def replay(self, between: Callable[[], None]) -> None:
        forward, backward = self._graphs
        forward.replay()
        between()
        backward.replay()
        self._tp.traffic.update(self._traffic)

    def idle_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot(self._pool)
        return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


class Replays:
    """Which passes are recorded, and when. All ranks must ask the same, in the same order.

    ``beside``: what is recorded may stay while other passes run. ``record`` makes Passes; a test has its own.
    """

    def __init__(
        self,
        model: BoundModel,
        *,
        beside: bool,
        record: Callable[[BoundModel, PackedBatch, Any], Passes] = CudaPasses,
    ) -> None:
        self._model, self._beside, self._record = model, beside, record
        self._is_possible = True
        self._group: dist.ProcessGroup | None = None
        self._seen: object = None
        self._repeats = 0
        self._patience, self._num_replayed = 1, WORTHWHILE
        self._batch: PackedBatch | None = None
        self._passes: list[Passes] = []
        self._peak_bytes = self._idle_bytes = 0
        model.tp.recordings.add(self)

    def ready(self, batches: Sequence[PackedBatch]) -> bool:
        """Whether ``run`` can take these micro-batches of a step, on the device. Records them if it has to and may: then a
        collective, one all-reduce of one number for each recording."""
        group = self._model.tp.group
        if self._group is not group:  # joined anew after a failure: recorded collectives are of the old one
            self.drop()
            self._group, self._seen = group, None
            self._patience, self._num_replayed = 1, WORTHWHILE
        structure = batches[0].structure if len({batch.structure for batch in batches}) == 1 else None
        self._repeats = self._repeats + 1 if structure is not None and structure == self._seen else 0
        self._seen = structure
        recorded = self._batch is not None and structure == self._batch.structure
        patience = 1 if self._num_replayed >= WORTHWHILE else 2 * self._patience
        if not recorded and self._repeats >= patience and self._is_possible:
            self.drop()
            self._batch, self._patience, self._num_replayed = batches[0], patience, 0
            recorded = self._add()
        if recorded and len(batches) > 1 and len(self._passes) == 1:
            recorded = self._add()
        self._num_replayed += recorded
        return recorded

    def run(self, batch: PackedBatch, *, accumulate: bool, between: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of one micro-batch: its loss and number of hits, valid until the next run. Sets the
        gradients, or adds to them. ``between`` is called between the starts of the passes."""
        assert self._batch is not None
        passes = self._passes[accumulate]
        self._batch.copy_(batch)
        passes.replay(between)
        assign(self._model, passes.gradients)  # while the device works
        return passes.loss, passes.correct

    def make_room(self) -> None:
        """Before passes that are not replayed."""
        if not self._beside:
            self.drop()

    def drop(self) -> None:
        """Give the memory of all that is recorded back to the allocator."""
        self._note_peak(idle_bytes=0)
        self._passes, self._batch = [], None

    def peak_memory_bytes(self) -> int:
        """The most that was allocated at once, with what a graph keeps from everyone else."""
        self._note_peak(self._idle_bytes)
        return self._peak_bytes

    def _add(self) -> bool:
        """Record the first, or the second and every further micro-batch; whether all ranks could. Collective."""
        assert self._batch is not None
        failed = False
        self._note_peak(idle_bytes=0)  # a second recording uses what the first one left
        try:
            self._passes.append(self._record(self._model, self._batch, self._passes[0] if self._passes else None))
        except RuntimeError as error:  # of this rank alone, perhaps: all go on as before
            traceback.clear_frames(error.__traceback__)
            log.warning("rank %d: steps are not recorded: %s", self._model.tp.rank, error)
            failed = True
        self._model.zero_grad()
        # not Control.agree: nothing is raised, and another rank may raise elsewhere, which leaves the compute group
        flag = torch.tensor(float(failed), device=self._batch.token_ids.device)
        if self._model.tp.all_reduce_(flag, dist.ReduceOp.MAX).item():
            self._is_possible = False
            self._model.tp.restart_sums()
            self.drop()
            return False
        self._note_peak(self._passes[-1].idle_bytes())
        return True

    def _note_peak(self, idle_bytes: int) -> None:
        """Of the time until now; from now on the allocator counts ``idle_bytes`` as unused that a replay uses."""
        if torch.cuda.is_initialized():
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated() + self._idle_bytes)
            torch.cuda.reset_peak_memory_stats()
        self._idle_bytes = idle_bytes


def assign(model: BoundModel, gradients: Gradients) -> None:
    """Make them the gradients of the model's leaves."""
    for leaf, gradient in zip(model.leaves, gradients, strict=True):
        leaf.grad = gradient
