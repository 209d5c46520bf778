"""Log-probabilities of target tokens over a vocabulary that is split over the tensor-parallel (TP) ranks.

Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al. 2019, section 3) joined with the head's matrix product and
chunked over tokens: the logits of a chunk are formed, reduced and thrown away, and formed again in the backward pass, so
that neither [tokens, vocabulary / p] logits nor their gradient ever exist as a whole. Ranks may hold different numbers of
vocabulary rows, even none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_tp.parallel import TPGroup, copy_to_region

CHUNK_BYTES = 256 * 2**20
"""Upper bound of one chunk of fp32 logits; a chunk has at least one token."""


@dataclass(frozen=True)
class LogitsTransform:
    """What a model does to its logits: ``scale * logits``, then ``softcap * tanh(logits / softcap)`` if given."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward(self, transformed: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, from the transformed ones and their gradient; both fp32 [n, v]."""
        if self.softcap is not None:
            grad = grad * (1.0 - (transformed / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows [start, start + number of local rows) of this rank, and the group they are split over.

    ``compiled``: the arithmetic on a chunk of logits runs as compiled code, in few passes over them.
    """

    start: int
    tp: TPGroup
    transform: LogitsTransform = LogitsTransform()
    compiled: bool = False


def target_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(transform(hidden @ weight.T)), and whether it is the arg max.

    ``hidden`` [N, H] and ``targets`` int64 [N] (global ids) are the same on all ranks; ``weight`` [v, H] is local, v may
    be 0. Returns fp32 [N] (differentiable, nats) and bool [N], the same on all ranks. Collectives: forward one max and
    one sum all-reduce of [N] and [2, N] fp32; backward one sum all-reduce of [N, H] in hidden's dtype. None if N is 0.
    """
    hidden = copy_to_region(hidden, vocab.tp)
    logprobs, correct = _TargetLogprobs.apply(hidden, weight, targets, vocab)
    return logprobs, correct


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
        tokens, rows = hidden.shape[0], weight.shape[0]
        local_max = hidden.new_full((tokens,), -torch.inf, dtype=torch.float32)
        sums = hidden.new_zeros((2, tokens), dtype=torch.float32)  # sum of exponentials, target logit
        statistics = _compiled(_statistics) if vocab.compiled else _statistics
        for part in _chunks(tokens, rows):
            local, owned = _local_targets(targets[part], vocab.start, rows)
            found = statistics(hidden[part], weight, local, owned, vocab.transform)
            local_max[part], sums[0, part], sums[1, part] = found
        top = local_max
        if tokens:
            top = vocab.tp.all_reduce_(local_max.clone(), dist.ReduceOp.MAX)
            sums[0] *= (local_max - top).exp()
            vocab.tp.all_reduce_(sums)
        normalizer = sums[0].log() + top
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.vocab = vocab
        correct = sums[1] >= top
        ctx.mark_non_differentiable(correct)
        return sums[1] - normalizer, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        vocab, rows = ctx.vocab, weight.shape[0]
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        logits_gradient = _compiled(_logits_gradient) if vocab.compiled else _logits_gradient
        for part in _chunks(hidden.shape[0], rows):
            local, owned = _local_targets(targets[part], vocab.start, rows)
            upstream = grad[part], normalizer[part]
            grad_logits = logits_gradient(hidden[part], weight, local, owned, *upstream, vocab.transform)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:  # a frozen head has none
                grad_weight.addmm_(grad_logits.T, hidden[part])
        return grad_hidden, grad_weight, None, None


def _statistics(
    hidden: Tensor, weight: Tensor, local: Tensor, owned: Tensor, transform: LogitsTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk of n tokens, fp32 [n] each: largest local logit, sum of exponentials below it, target logit or 0."""
    logits = transform((hidden @ weight.T).float())
    largest = logits.amax(-1)
    total = (logits - largest[:, None]).exp().sum(-1)
    return largest, total, torch.where(owned, logits.gather(1, local[:, None])[:, 0], 0.0)


def _logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    owned: Tensor,
    grad: Tensor,
    normalizer: Tensor,
    transform: LogitsTransform,
) -> Tensor:
    """Gradient with respect to a chunk's raw logits, [n, v] in the weight's dtype; ``grad`` [n] is that of the output."""
    logits = transform((hidden @ weight.T).float())
    rows = torch.arange(weight.shape[0], device=weight.device)
    target = (rows[None, :] == local[:, None]) & owned[:, None]
    grad_logits = (target.float() - (logits - normalizer[:, None]).exp()) * grad[:, None]
    return transform.backward(logits, grad_logits).to(weight.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For any length from the start: the last chunk of a batch is shorter than the others. Made when first needed, since
    the compiler alone takes seconds to import."""
    return torch.compile(function, dynamic=True)  # type: ignore[no-any-return]


def _chunks(tokens: int, rows: int) -> list[slice]:
    """Token ranges whose fp32 logits stay below CHUNK_BYTES; none if this rank has no vocabulary rows."""
    if rows == 0:
        return []
    size = max(1, CHUNK_BYTES // (4 * rows))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _local_targets(targets: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each target on this rank (0 where another rank has it), and whether this rank has it."""
    local = targets - start
    owned = (local >= 0) & (local < rows)
    return local.where(owned, 0), owned


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7): loss and reward margin of each pair, fp32 [N].

    ``policy`` and ``reference`` are [N, 2]: summed log-probabilities (nats) of the preferred and of the rejected answer.
    No collective: both are the same on all ranks.
    """
    gain = policy - reference
    margin = beta * (gain[:, 0] - gain[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin
