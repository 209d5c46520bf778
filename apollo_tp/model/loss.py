"""Log-probabilities of target tokens over a vocabulary that is split over the tensor-parallel (TP) ranks.

Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al. 2019, section 3) joined with the head's matrix product and
chunked over tokens: neither the local logits [N, V_local] of all N loss tokens nor their gradient ever exist at once.
``target_logprobs`` throws the logits of a chunk away and computes them again in the backward pass. ``nll_sum``, whose
gradient is known but for one factor, computes it from the logits in the forward pass (Liger Kernel, Hsu et al. 2024), which
saves one of four products. Ranks may have different numbers of vocabulary rows, even none.

Shapes: N loss tokens of a micro-batch, n of a chunk, D hidden size, V vocabulary, V_local rows of it on this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from apollo_tp.distributed.collectives import copy_to_region
from apollo_tp.distributed.tp_group import TPGroup

CHUNK_BYTES = 512 * 2**20
"""Upper bound of one chunk of fp32 logits; a chunk has at least one token."""
MAX_ROUNDED_SUMS = 4
"""Chunks whose gradients of the head are added up in its own dtype. Each addition rounds: in bf16, the error of 256 is 2 %.
Those of more chunks are added up in fp32, which takes twice the memory of the head."""
_LEAST_SHIFT = -1e4
"""Of a rank without rows of the vocabulary, in place of minus infinity; its exponential is 0 as well."""


@dataclass(frozen=True)
class LogitsTransform:
    """What a model does to its logits: ``scale * logits``, then ``softcap * tanh(logits / softcap)`` if given."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed ``logits`` (any shape and dtype). Local."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward(self, transformed: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, from the transformed ones and their gradient; all fp32 [n, V_local]."""
        if self.softcap is not None:
            grad = grad * (1.0 - (transformed / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows [start, start + V_local) of this rank, and the group they are split over.

    ``compiled``: the arithmetic on a chunk of logits runs as compiled code, in few passes over them. ``global_rows``: V, if
    the vocabulary is split. ``chunk_bytes``: see CHUNK_BYTES; the same on all ranks.
    """

    start: int
    tp: TPGroup
    transform: LogitsTransform = LogitsTransform()
    compiled: bool = False
    global_rows: int = 0
    chunk_bytes: int = CHUNK_BYTES

    def chunks(self, tokens: int, rows: int) -> list[slice]:
        """Token ranges whose fp32 logits [n, rows] stay below ``chunk_bytes``; none if there are no ``rows``."""
        if rows == 0:
            return []
        size = max(1, self.chunk_bytes // (4 * rows))
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def statistics(
        self, logits: Tensor, targets: Tensor, inverse_temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See _statistics. ``logits`` raw, local [n, V_local]; ``targets`` int64 [n], global ids. Local."""
        if logits.shape[1] == 0:
            zero = logits.new_zeros(len(targets), dtype=torch.float32)
            return torch.full_like(zero, -torch.inf), zero, zero
        function = _compiled(_statistics) if self.compiled else _statistics
        local = self._local(targets, logits.shape[1])
        return function(logits, *local, self.transform, inverse_temperature)  # type: ignore[no-any-return]

    def spread(self, logits: Tensor, largest: Tensor, inverse_temperature: Tensor | None = None) -> Tensor:
        """See _spread. ``largest`` is that of ``statistics``. Local."""
        if logits.shape[1] == 0:
            return torch.zeros_like(largest)
        function = _compiled(_spread) if self.compiled else _spread
        return function(logits, largest, self.transform, inverse_temperature)  # type: ignore[no-any-return]

    def logits_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        grad: Tensor,
        normalizer: Tensor,
        inverse_temperature: Tensor | None = None,
    ) -> Tensor:
        """See _logits_gradient; ``targets`` int64 [n], global ids; V_local > 0. Local."""
        function = _compiled(_logits_gradient) if self.compiled else _logits_gradient
        local = self._local(targets, logits.shape[1])
        return function(logits, *local, grad, normalizer, self.transform, inverse_temperature)  # type: ignore[no-any-return]

    def agree(self, largest: Tensor, sums: Tensor) -> Tensor:
        """From local to global statistics, fp32: returns that of ``largest`` [n], changes ``sums`` [2 or 3, n] in place. The
        rows of ``sums`` are a sum of exponentials, a target's logit and, if there, the ``spread``.

        Two all-reduces, a maximum of [n] and a sum of [2 or 3, n].
        """
        top = self.tp.all_reduce_(largest.clone(), dist.ReduceOp.MAX)
        shift = largest - top
        if len(sums) > 2:  # a rank without rows has -inf, and nothing to shift
            sums[2] = (sums[2] + sums[0] * shift.clamp(min=_LEAST_SHIFT)) * shift.exp()
        sums[0] *= shift.exp()
        self.tp.all_reduce_(sums)
        return top

    def _local(self, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The row of each target on this rank (0 where another rank has it), and whether this rank has it; both [n]."""
        local = targets - self.start
        owned = (local >= 0) & (local < rows)
        return local.where(owned, 0), owned


def target_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: VocabShard, inverse_temperature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(transform(hidden @ weight.T)), and whether it is the arg max.

    ``hidden`` [N, D] and ``targets`` int64 [N] (global ids) are the same on all ranks, as is ``inverse_temperature`` (fp32
    [N]; None is 1), which the transformed logits are multiplied by; ``weight`` [V_local, D] is local, V_local may be 0.
    Returns fp32 [N] (differentiable, nats) and bool [N], the same on all ranks. Collectives: forward one max and one sum
    all-reduce of [N] and [2, N] fp32; backward one sum all-reduce of [N, D] in hidden's dtype. None if N is 0.
    """
    hidden = copy_to_region(hidden, vocab.tp)
    logprobs, correct, _ = _TargetLogprobs.apply(hidden, weight, targets, vocab, inverse_temperature, False)
    return logprobs, correct


def logprobs_with_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: VocabShard, inverse_temperature: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``target_logprobs``, and the entropy of each distribution (nats, fp32 [N], not differentiable, the same on all ranks).
    Collectives: as there, with [3, N] in place of [2, N]."""
    hidden = copy_to_region(hidden, vocab.tp)
    return _TargetLogprobs.apply(hidden, weight, targets, vocab, inverse_temperature, True)  # type: ignore[no-any-return]


def nll_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, vocab: VocabShard
) -> tuple[Tensor, Tensor]:
    """``-(weights * log-probabilities).sum()`` of the targets (nats, fp32, 0-d, differentiable), and their arg-max hits [N].

    Arguments as in ``target_logprobs``; ``weights`` fp32 [N]. With gradients enabled, those of hidden and weight are
    computed here, in the forward pass. Collectives: per chunk of tokens one max and one sum all-reduce of [n] and [2, n]
    fp32; backward one sum all-reduce of [N, D] in hidden's dtype.
    """
    if not torch.is_grad_enabled():
        logprobs, correct = target_logprobs(hidden, weight, targets, vocab)
        return -(weights * logprobs).sum(), correct
    return _NllSum.apply(copy_to_region(hidden, vocab.tp), weight, targets, weights, vocab)  # type: ignore[no-any-return]


@functools.cache
def unit(device: torch.device) -> Tensor:
    """The number 1 (fp32, 0-d): ``loss.backward(unit(device))`` spares ``nll_sum`` a pass over the gradient of the head."""
    return torch.ones((), device=device)


class _TargetLogprobs(torch.autograd.Function):
    """``target_logprobs`` inside the parallel region: the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab: VocabShard,
        inverse_temperature: Tensor | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens, scale = hidden.shape[0], inverse_temperature
        top = hidden.new_full((tokens,), -torch.inf, dtype=torch.float32)
        # sum of exponentials, target logit, spread
        sums = hidden.new_zeros((3 if with_entropy else 2, tokens), dtype=torch.float32)
        for part in vocab.chunks(tokens, weight.shape[0]):
            logits, inverse = hidden[part] @ weight.T, None if scale is None else scale[part]
            top[part], sums[0, part], sums[1, part] = vocab.statistics(logits, targets[part], inverse)
            if with_entropy:
                sums[2, part] = vocab.spread(logits, top[part], inverse)
        if tokens:
            top = vocab.agree(top, sums)
        normalizer = sums[0].log() + top
        ctx.save_for_backward(hidden, weight, targets, normalizer, *([] if scale is None else [scale]))
        ctx.vocab = vocab
        correct = sums[1] >= top
        entropy = sums[0].log() - sums[2] / sums[0] if with_entropy else None
        ctx.mark_non_differentiable(correct, *([] if entropy is None else [entropy]))
        return sums[1] - normalizer, correct, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, *scale = ctx.saved_tensors
        chunks = ctx.vocab.chunks(hidden.shape[0], weight.shape[0])
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = _empty_sum(weight, len(chunks)).zero_()
        for part in chunks:
            logits, inverse = hidden[part] @ weight.T, scale[0][part] if scale else None
            grad_logits = ctx.vocab.logits_gradient(logits, targets[part], grad[part], normalizer[part], inverse)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:  # a frozen head has none
                _add_product(grad_weight, grad_logits.T, hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


class _NllSum(torch.autograd.Function):
    """``nll_sum`` inside the parallel region: the forward pass computes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        tokens, rows = hidden.shape[0], weight.shape[0]
        logprobs = hidden.new_zeros(tokens, dtype=torch.float32)
        correct = torch.zeros(tokens, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if rows else torch.zeros_like(hidden)
        # The same chunks on all ranks, whatever rows each has: every chunk has its collectives.
        chunks = vocab.chunks(tokens, -(-vocab.global_rows // vocab.tp.size) or rows)
        # a frozen head has no gradient
        grad_weight = _empty_sum(weight, len(chunks)) if ctx.needs_input_grad[1] else None
        if grad_weight is not None and (not chunks or grad_weight.dtype != weight.dtype):
            grad_weight.zero_()
        for part in chunks:
            logits = hidden[part] @ weight.T
            largest, *local_sums = vocab.statistics(logits, targets[part])
            sums = torch.stack(local_sums)
            top = vocab.agree(largest, sums)
            normalizer = sums[0].log() + top
            logprobs[part], correct[part] = sums[1] - normalizer, sums[1] >= top
            if rows:
                grad_logits = vocab.logits_gradient(logits, targets[part], -weights[part], normalizer)
                torch.mm(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None and part.start == 0 and grad_weight.dtype == weight.dtype:
                    torch.mm(grad_logits.T, hidden[part], out=grad_weight)
                elif grad_weight is not None:
                    _add_product(grad_weight, grad_logits.T, hidden[part])
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(correct)
        return -(weights * logprobs).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None  # once: scaled in place
        if grad.data_ptr() != unit(grad.device).data_ptr():
            grad_hidden.mul_(grad)
            if grad_weight is not None:
                grad_weight.mul_(grad)
        return grad_hidden, grad_weight, None, None, None


def _empty_sum(weight: Tensor, num_chunks: int) -> Tensor:
    """Memory for the head's gradient, like ``weight`` [V_local, D], or fp32 if it is the sum over many chunks."""
    return torch.empty_like(weight, dtype=weight.dtype if num_chunks <= MAX_ROUNDED_SUMS else torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a`` [m, k] @ ``b`` [k, n] to ``total`` [m, n], which has their dtype or is fp32. Local."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _tempered(logits: Tensor, transform: LogitsTransform, inverse_temperature: Tensor | None) -> Tensor:
    """The logits [n, V_local] of the softmax, fp32."""
    logits = transform(logits.float())
    return logits if inverse_temperature is None else logits * inverse_temperature[:, None]


def _statistics(
    logits: Tensor, local: Tensor, owned: Tensor, transform: LogitsTransform, inverse_temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of n tokens: largest local logit, sum of exp(logit - largest), target's logit (0 on another rank).

    ``logits`` raw, local [n, V_local]; ``local`` int64 [n] and ``owned`` bool [n]: see VocabShard._local. Returns fp32 [n]
    each, local.
    """
    logits = _tempered(logits, transform, inverse_temperature)
    largest = logits.amax(-1)
    total = (logits - largest[:, None]).exp().sum(-1)
    return largest, total, torch.where(owned, logits.gather(1, local[:, None])[:, 0], 0.0)


def _spread(logits: Tensor, largest: Tensor, transform: LogitsTransform, inverse_temperature: Tensor | None) -> Tensor:
    """Sum of exp(logit - largest) * (logit - largest), fp32 [n]: the entropy is log(total) - spread / total. Local."""
    below = _tempered(logits, transform, inverse_temperature) - largest[:, None]
    return (below.exp() * below).sum(-1)


def _logits_gradient(
    logits: Tensor,
    local: Tensor,
    owned: Tensor,
    grad: Tensor,
    normalizer: Tensor,
    transform: LogitsTransform,
    inverse_temperature: Tensor | None,
) -> Tensor:
    """Gradient with respect to a chunk's raw logits: local [n, V_local] in their dtype.

    ``grad`` fp32 [n] is that of the log-probability, ``normalizer`` fp32 [n] the log of the global sum of exponentials.
    """
    transformed = transform(logits.float())
    tempered = transformed if inverse_temperature is None else transformed * inverse_temperature[:, None]
    rows = torch.arange(logits.shape[1], device=logits.device)
    target = (rows[None, :] == local[:, None]) & owned[:, None]
    if inverse_temperature is not None:
        grad = grad * inverse_temperature
    grad_logits = (target.float() - (tempered - normalizer[:, None]).exp()) * grad[:, None]
    return transform.backward(transformed, grad_logits).to(logits.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for any length from the start: the last chunk of a batch is shorter than the others.

    It is compiled when first needed, since importing the compiler takes seconds.
    """
    return torch.compile(function, dynamic=True)  # type: ignore[no-any-return]


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7): loss and reward margin of each of n pairs, fp32 [n].

    ``policy`` and ``reference`` fp32 [n, 2]: summed log-probabilities (nats) of the preferred and of the rejected answer.
    No collective: both are the same on all ranks.
    """
    gain = policy - reference
    margin = beta * (gain[:, 0] - gain[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin
