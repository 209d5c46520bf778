"""Before the first step on a GPU: run a few short steps to plan the memory of the longest. Weights and state do not change.

A profiling run is a complete step whose loss is reported as not finite, so that the optimizer, by its own rule, writes
nothing: what is measured is what a step allocates, the optimizer's temporaries included.
"""

from __future__ import annotations

import gc
import logging
import traceback
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from apollo_tp.config import GradientMode
from apollo_tp.errors import DeviceMemoryError
from apollo_tp.model.batch import PackedBatch, pack
from apollo_tp.model.loss import MAX_ROUNDED_SUMS, unit
from apollo_tp.training.memory_plan import (
    MARGIN,
    MAX_FIRST_TOKENS,
    MemoryPlan,
    ProfiledRun,
    first_lengths,
    is_linear,
    longest_that_fits,
    out_of_memory,
    predict,
)
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample

log = logging.getLogger(__name__)


class Meter(Protocol):
    """Bytes on this rank's device."""

    def segment_peak(self) -> int:
        """The most that was allocated at once since the last call, which begins the next segment."""

    def allocated(self) -> int:
        """What is allocated now."""

    def available(self) -> int:
        """What could be allocated in addition."""


class CudaMeter:
    """The counts of torch's allocator, which follow the host and need no synchronisation. ``available`` is the device's
    free memory, and what this process's allocator has unused."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def segment_peak(self) -> int:
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def available(self) -> int:
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + unused


def reserve_peer_memory(trainer: Trainer) -> None:
    """Make the buffers for sums through peer memory, as large as the longest micro-batch needs them, before its memory is
    planned. Collective, as PeerSums.reserve."""
    tp, model = trainer.tp, trainer.model
    num_bytes = trainer.max_micro_batch_tokens * model.widest_sum_bytes()
    tp.peers.reserve(tp.rank, tp.size, tp.group, trainer.device, num_bytes)


def plan_memory(
    trainer: Trainer, meter: Meter, max_sequence_tokens: int, *, max_first_tokens: int = MAX_FIRST_TOKENS
) -> MemoryPlan:
    """The plan of the rank that has the least room, the same on all ranks. Collective: steps that write nothing, two
    all-gathers, and an all-reduce for each further length.

    Stored gradients are planned as they are from the second micro-batch of a step on: all of them live together with
    its activations. ``max_first_tokens``: see first_lengths. Raises DeviceMemoryError if a micro-batch of
    ``trainer.max_micro_batch_tokens`` does not fit on some rank: on all of them from the plan, or only on a rank that
    runs out of memory before (the others then fail in a collective).
    """
    return _MemoryProfiler(trainer, meter, max_sequence_tokens).plan(max_first_tokens)


class _MemoryProfiler:
    """The runs of ``plan_memory`` and what they measured on this rank. All ranks take the same lengths in the same order."""

    def __init__(self, trainer: Trainer, meter: Meter, max_sequence_tokens: int) -> None:
        self.trainer, self.meter, self.max_sequence_tokens = trainer, meter, max_sequence_tokens
        self.model, self.optimizer, self.world = trainer.model, trainer.optimizer, trainer.mesh.world
        self.in_backward = trainer.gradients is GradientMode.in_backward
        self.device = trainer.device
        self.vocab_size = self.model.module.config.get_text_config().vocab_size
        trained = {id(p.leaf): p.leaf for p in self.model.parameters if p.leaf.requires_grad}
        self.leaves: list[nn.Parameter] = list(trained.values())
        self.not_finite = torch.full((), torch.nan, device=self.device)
        self.length = 0
        self.runs: list[ProfiledRun] = []
        self.optimizer_peak = 0

    def plan(self, max_first_tokens: int) -> MemoryPlan:
        kept, tokens = self._kept_gradient_bytes(), self.trainer.max_micro_batch_tokens
        self._agree(MemoryPlan(self.world.rank, tokens, kept, 0, 0, self.meter.available(), 0))
        skipped_before = self.optimizer.skipped_in_a_row
        try:
            self._profile(max_first_tokens)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the activations, and the group that peers wait in
            self._clean_up()
            text = self._refusal_after_out_of_memory()
            log.error("%s", text)  # at once: peers that wait in a collective may take long to give up
            self.trainer.mesh.world.dissolve()
            raise DeviceMemoryError(text) from None
        self.optimizer.skipped_in_a_row = skipped_before
        self._clean_up()
        # only now: what the first steps leave for good (workspaces, tables, communicators) is allocated
        base = self.meter.allocated()
        return self._agree(
            MemoryPlan(
                rank=self.world.rank,
                tokens=tokens,
                gradients=kept,
                activations=max(0, predict(self.runs, tokens) - base - kept) + self._unseen_bytes(tokens),
                optimizer=max(0, self.optimizer_peak - base - kept),
                available=self.meter.available(),
                largest=self._largest(tokens),
            )
        )

    def _largest(self, max_tokens: int) -> int:
        """The largest number of tokens, up to ``max_tokens``, that should fit into what is free now, MARGIN included."""
        limit = self.meter.allocated() + int(self.meter.available() / (1 + MARGIN)) - self._unseen_bytes(max_tokens)
        return longest_that_fits(self.runs, max_tokens, limit)

    @property
    def _chunk_tokens(self) -> int:
        """Tokens in a chunk of the loss, by an even cut of the vocabulary: all ranks must take the same lengths."""
        return self.model.vocab.chunk_bytes // (4 * -(-self.vocab_size // self.trainer.tp.size))

    def _unseen_bytes(self, tokens: int) -> int:
        """What ``tokens`` need, but no run has: fp32 memory in which the head's gradients of many chunks are added up."""
        few = MAX_ROUNDED_SUMS * self._chunk_tokens
        return 4 * self.model.head_weight.numel() if self.length <= few < tokens else 0

    def _kept_gradient_bytes(self) -> int:
        """Bytes of the gradients that live until the optimizer's step."""
        freed = set(self.optimizer.in_backward.names) if self.in_backward and self.optimizer.in_backward else set()
        kept = {id(p.leaf): p.leaf for p in self.model.parameters if p.leaf.requires_grad and p.name not in freed}
        return sum(leaf.nbytes for leaf in kept.values())

    def _profile(self, max_first_tokens: int) -> None:
        """Micro-batches of three lengths, and longer ones until the need is linear or the longest is reached."""
        max_tokens = self.trainer.max_micro_batch_tokens
        lengths = first_lengths(max_tokens, self._chunk_tokens, max_first_tokens)
        self._step(lengths[0])  # compiles, allocates workspaces, and leaves gradients to be accumulated onto
        base = self.meter.allocated()
        for tokens in lengths:
            self._run(tokens, base)
        while self.length < max_tokens and not self._is_linear_on_all_ranks(base):
            self._run(min(2 * self.length, max_tokens), base)

    def _run(self, tokens: int, base: int) -> None:
        self.runs.append(ProfiledRun(tokens, self._step(tokens)))
        log.debug("trial of %d tokens: %.3f GB", tokens, (max(self.runs[-1].peaks) - base) / 1e9)

    def _is_linear_on_all_ranks(self, base: int) -> bool:
        """One all-reduce of one number."""
        # over the compute group, which a rank that raised meanwhile has left, so that the others do not wait for it
        linear = torch.tensor(float(is_linear(self.runs, base)), device=self.device)
        return bool(self.world.all_reduce_(linear, dist.ReduceOp.MIN))

    def _step(self, tokens: int) -> tuple[int, ...]:
        """One micro-batch and an optimizer step that writes nothing; the peak of each segment up to the optimizer's."""
        self.length = tokens
        if self.in_backward:
            self.model.zero_grad()
        peaks: list[int] = []

        def end_segment(_: object = None) -> None:
            peaks.append(self.meter.segment_peak())

        batch = self._batch(tokens)
        self.meter.segment_peak()
        # registered after the hook that updates in the backward pass
        handles = [leaf.register_post_accumulate_grad_hook(end_segment) for leaf in self.leaves]
        try:
            loss = self.model.forward_loss(batch.scaled(1.0 / batch.weight_sum).to(self.device)).loss
            end_segment()
            if self.in_backward:
                self.optimizer.begin_step_in_backward(loss=self.not_finite)
            loss.backward(unit(loss.device))
        finally:
            for handle in handles:
                handle.remove()
        self.model.finish_gradients(compare=self.optimizer.config.check_replicas_every > 0)
        end_segment()
        outcome = self.optimizer.step(loss=self.not_finite)
        assert outcome.skipped, "a step with a loss that is not finite went through"
        self.optimizer_peak = self.meter.segment_peak()
        return tuple(peaks)

    def _batch(self, tokens: int) -> PackedBatch:
        """One micro-batch of ``tokens`` in sequences as long as they may be; all tokens but each one's first are learned."""
        longest = min(self.max_sequence_tokens, tokens)
        lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
        samples = [Sample([7919 * i % self.vocab_size for i in range(n)], [0.0] + [1.0] * (n - 1)) for n in lengths]
        (batch,) = pack(samples, tokens)
        return batch

    def _agree(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan of the rank that lacks most. One all-gather. Raises DeviceMemoryError on all ranks if it lacks any."""
        # over the compute group as in _is_linear_on_all_ranks; figures rather than errors, so not Control.agree
        own = [plan.gradients, plan.activations, plan.optimizer, plan.available, plan.largest]
        rows = self.world.all_gather(torch.tensor([own], device=self.device)).tolist()
        plans = [MemoryPlan(rank, plan.tokens, *row) for rank, row in enumerate(rows)]
        worst = max(plans, key=lambda p: p.missing)
        if worst.missing > 0:
            raise DeviceMemoryError(worst.refusal(recomputes=self._recomputes, in_backward=self.in_backward))
        return worst

    def _refusal_after_out_of_memory(self) -> str:
        """The message; two shorter trials show what this rank has room for."""
        return out_of_memory(
            self.world.rank,
            self.length,
            self.trainer.max_micro_batch_tokens,
            self.meter.available(),
            self._largest(self.length - 1) if len(self.runs) > 1 else 0,
            recomputes=self._recomputes,
            in_backward=self.in_backward,
        )

    @property
    def _recomputes(self) -> bool:
        return bool(self.model.module.is_gradient_checkpointing)

    def _clean_up(self) -> None:
        """No gradients, and no unused memory: the server may want it."""
        self.optimizer.zero_grad()
        self.model.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.meter.segment_peak()
