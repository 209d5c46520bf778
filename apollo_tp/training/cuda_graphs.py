"""CUDA-graph capture and replay of forward and backward passes, for consecutive steps with the same batch structure.

A micro-batch launches some thousand kernels, and the host takes about as long to launch them as the device to run them; a
replay is one call. A graph holds for micro-batches of one structure (lengths of sequences, number of loss tokens): a step
whose micro-batches do not all have the structure of the step before runs without graphs. So do the first steps of a
structure where graphs have not paid for their capture before.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
import warnings
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
MIN_REPLAYS = 8
"""Replayed steps that make up for a capture. After a capture with fewer, the next one waits for twice as many steps in a row
of one structure."""


class ForwardBackward(Protocol):
    """A captured forward and backward pass over a batch whose tensors stay where they are, as all results do.

    ``loss`` and ``correct`` are those of LossSums (0-d, fp32, the same on all ranks), ``gradients`` those of
    ``BoundModel.leaves``, in the same order: local, not yet finished.
    """

    loss: Tensor
    correct: Tensor
    gradients: Gradients

    def replay(self, between: Callable[[], None]) -> None:
        """Run both passes; ``between`` is called after the start of the forward pass, before that of the backward pass."""

    def idle_bytes(self) -> int:
        """Memory that only a replay uses, and that nothing else can have."""


class CudaForwardBackward:
    """Both passes as two CUDA graphs: the device begins with the forward pass while the host still launches the other.

    After ``before``, of the same batch, they add to its gradients and use its memory. Capturing runs nothing. Collective.
    Raises RuntimeError for work that cannot be captured (work that waits for the device, say), and where memory is short.
    """

    def __init__(self, model: BoundModel, batch: PackedBatch, before: CudaForwardBackward | None) -> None:
        tp, one = model.tp, unit(batch.token_ids.device)
        traffic = Counter(tp.traffic)
        self._pool = torch.cuda.graph_pool_handle() if before is None else before._pool
        assign_gradients(model, [None] * len(model.leaves) if before is None else before.gradients)
        gc.collect()  # now, rather than while CUDA's calls are captured
        torch.cuda.empty_cache()  # a capture takes new memory, and can have none that the allocator keeps
        with capture(self._pool) as self._forward:
            tp.peers.barrier()  # what ran before may have left off at either half of the peers' memory
            sums = model.forward_loss(batch)
        with capture(self._pool) as self._backward:
            sums.loss.backward(one)
            tp.peers.barrier()
        self.loss, self.correct = sums.loss.detach(), sums.correct
        self.gradients = [leaf.grad for leaf in model.leaves]
        self._buffers = tp.peers.buffers  # the graphs read their memory
        self._tp, self._traffic = tp, tp.traffic - traffic

    def replay(self, between: Callable[[], None]) -> None:
        self._forward.replay()
        between()
        self._backward.replay()
        self._tp.traffic.update(self._traffic)

    def idle_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot(self._pool)
        return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


@contextlib.contextmanager
def capture(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what this block launches on the current stream into a new graph, with memory from ``pool``.

    A capture that fails leaves stream and allocators as they were. Raises what the block raises, and RuntimeError.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    is_limited = stream != torch.cuda.default_stream()  # to some SMs (sm_limit), as replays are then
    # Threads that watch over NCCL ask for events meanwhile, which is no part of the capture: hence the mode.
    capturing = torch.cuda.graph(
        graph, pool=pool, stream=stream if is_limited else None, capture_error_mode="thread_local"
    )
    try:
        with torch.cuda.stream(stream), capturing:  # a capture that fails would leave its stream the current one
            yield graph
    except BaseException:
        _end_failed_capture(graph, capturing.capture_stream)
        raise


def _end_failed_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """End what ``torch.cuda.graph`` leaves open after an error that made CUDA invalidate the capture.

    cudaStreamEndCapture then fails, and ``capture_end`` raises before it ends the use of the memory pool. torch's allocators
    would take the capture for running as long as the process lives: memory that two streams used would never be used again,
    nor the pool's. An empty capture on the same stream lets ``capture_end`` come to its end.
    """
    with contextlib.suppress(RuntimeError):
        graph.pool()  # raises unless the capture has ended
        return
    from cuda.bindings import runtime

    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        runtime.cudaStreamBeginCapture(
            stream.cuda_stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        graph.capture_end()
    graph.reset()


class GraphCache:
    """Which passes are captured, and when. All ranks must make the same calls, in the same order.

    ``keep``: captured passes keep their memory while other passes run. ``record`` captures; tests pass their own.
    ``min_replays``: see MIN_REPLAYS.
    """

    def __init__(
        self,
        model: BoundModel,
        *,
        keep: bool,
        record: Callable[[BoundModel, PackedBatch, Any], ForwardBackward] = CudaForwardBackward,
        min_replays: int = MIN_REPLAYS,
    ) -> None:
        self._model, self._keep, self._record, self._min_replays = model, keep, record, min_replays
        self._is_possible = True
        self._group: dist.ProcessGroup | None = None
        self._seen: object = None
        self._repeats = 0
        self._patience, self._num_replayed = 1, min_replays
        self._batch: PackedBatch | None = None
        self._passes: list[ForwardBackward] = []
        self._peak_bytes = self._idle_bytes = 0
        model.tp.call_before_dissolve(self.drop)

    def can_replay(self, batches: Sequence[PackedBatch]) -> bool:
        """Whether ``run`` can take the micro-batches of this step, which are on the device. Captures them if need be.

        Collective where it captures: one all-reduce of one number for each capture.
        """
        group = self._model.tp.group
        if self._group is not group:  # formed again after a failure: captured collectives belong to the old group
            self.drop()
            self._group, self._seen = group, None
            self._patience, self._num_replayed = 1, self._min_replays
        structure = batches[0].structure if len({batch.structure for batch in batches}) == 1 else None
        self._repeats = self._repeats + 1 if structure is not None and structure == self._seen else 0
        self._seen = structure
        captured = self._batch is not None and structure == self._batch.structure
        patience = 1 if self._num_replayed >= self._min_replays else 2 * self._patience
        if not captured and self._repeats >= patience and self._is_possible:
            self.drop()
            self._batch, self._patience, self._num_replayed = batches[0], patience, 0
            captured = self._capture()
        if captured and len(batches) > 1 and len(self._passes) == 1:
            captured = self._capture()
        self._num_replayed += captured
        return captured

    def run(self, batch: PackedBatch, *, accumulate: bool, between: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Replay one micro-batch: its loss and number of arg-max hits (0-d, fp32), valid until the next run.

        Sets the gradients of the leaves, or adds to them with ``accumulate``. ``between``: see ForwardBackward.replay.
        Collective: what was captured.
        """
        assert self._batch is not None
        passes = self._passes[accumulate]
        self._batch.copy_(batch)
        passes.replay(between)
        assign_gradients(self._model, passes.gradients)  # while the device works
        return passes.loss, passes.correct

    def release(self) -> None:
        """Before passes that are not replayed: drop what is captured, unless there is memory for both."""
        if not self._keep:
            self.drop()

    def drop(self) -> None:
        """Return the memory of all that is captured to the allocator."""
        self._note_peak(idle_bytes=0)
        self._passes, self._batch = [], None

    def peak_memory_bytes(self) -> int:
        """The most that was allocated at once, with what a graph keeps from everything else."""
        self._note_peak(self._idle_bytes)
        return self._peak_bytes

    def _capture(self) -> bool:
        """Capture the first, or the second and every further micro-batch; whether all ranks could. One all-reduce."""
        assert self._batch is not None
        failed = False
        self._note_peak(idle_bytes=0)  # a second capture uses what the first one left
        try:
            self._passes.append(self._record(self._model, self._batch, self._passes[0] if self._passes else None))
        except RuntimeError as error:  # perhaps only on this rank: all continue without graphs
            traceback.clear_frames(error.__traceback__)
            log.warning("rank %d: steps are not recorded: %s", self._model.tp.rank, error)
            failed = True
        self._model.zero_grad()
        # not Control.agree: nothing is raised, and another rank may raise elsewhere, which leaves the compute group
        flag = torch.tensor(float(failed), device=self._batch.token_ids.device)
        if self._model.tp.all_reduce_(flag, dist.ReduceOp.MAX).item():
            self._is_possible = False
            self._model.tp.peers.reset_buffers()
            self.drop()
            return False
        self._note_peak(self._passes[-1].idle_bytes())
        return True

    def _note_peak(self, idle_bytes: int) -> None:
        """Note the peak until now; from now on the allocator counts ``idle_bytes`` as unused that a replay uses."""
        if torch.cuda.is_initialized():
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated() + self._idle_bytes)
            torch.cuda.reset_peak_memory_stats()
        self._idle_bytes = idle_bytes


def assign_gradients(model: BoundModel, gradients: Gradients) -> None:
    """Make ``gradients`` those of the model's leaves, in the same order, without a copy."""
    for leaf, gradient in zip(model.leaves, gradients, strict=True):
        leaf.grad = gradient
