"""A bound model: the Hugging Face module over served memory, its losses, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model.batch import PackedBatch
from apollo_tp.model.compiled import decoder_layers
from apollo_tp.model.gradients import GradientSync
from apollo_tp.model.joined import JoinedLinear
from apollo_tp.model.loss import VocabShard, logprobs_with_entropy, nll_sum, target_logprobs
from apollo_tp.model.regions import RowParallelLinear
from apollo_tp.model.towers import language_model
from apollo_tp.shards.boxes import Shard

Role = Literal["matrix", "embedding", "other"]


@dataclass(frozen=True, eq=False)
class BoundParameter:
    """This rank's part of one checkpoint tensor: ``leaf[index]``, a view of served memory of ``shard.local_shape``.

    ``index`` is empty unless the leaf has several checkpoint tensors: stacked experts, joined rows. ``partial_gradient``:
    the gradient is complete only after ``BoundModel.finish_gradients``.
    """

    name: str
    shard: Shard
    role: Role
    leaf: nn.Parameter
    index: tuple[int | slice, ...] = ()
    partial_gradient: bool = False

    @property
    def tensor(self) -> Tensor:
        """The served values, local, shape ``shard.local_shape``: writing to them changes what is served."""
        return self.leaf.detach()[self.index]

    @property
    def grad(self) -> Tensor | None:
        """The accumulated gradient, a view of the local shape and dtype, or None before the first backward pass."""
        return None if self.leaf.grad is None else self.leaf.grad[self.index]

    @property
    def complete_leaf(self) -> nn.Parameter | None:
        """The leaf whose gradient contains this one, complete once autograd has accumulated it; None if it is a partial sum.

        A tied embedding's is complete: autograd adds both uses before it accumulates.
        """
        return None if self.partial_gradient else self.leaf


@dataclass(frozen=True)
class LossSums:
    """Sums over a micro-batch, the same on all ranks.

    ``loss``: sum of weight x negative log-likelihood (nats, fp32, 0-d, differentiable); ``correct``: number of loss tokens
    that are the arg max (fp32, 0-d).
    """

    loss: Tensor
    correct: Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """Of the N loss tokens of a micro-batch, fp32 [N], the same on all ranks: ``logprobs`` (nats, differentiable),
    whether each is the arg max (bool), and the entropy (nats) of the distribution that it is drawn from."""

    logprobs: Tensor
    correct: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class SequenceLogprobs:
    """Log-probabilities of a micro-batch of S sequences and T tokens, the same on all ranks, in nats.

    ``tokens`` fp32 [T] (differentiable): at position t that of ``batch.targets[t]``, 0 where ``batch.weights[t]`` is 0.
    ``sequences`` fp32 [S] (differentiable): sums of weight x log-probability, in the order of ``batch.sample_index``.
    ``correct`` fp32 [S]: number of loss tokens that are the arg max.
    """

    tokens: Tensor
    sequences: Tensor
    correct: Tensor


def final_hidden_states(module: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final hidden states [T, D] of the packed tokens, in the module's dtype, the same on all ranks. No head.

    Collective: the sums of the module's parallel regions.
    """
    longest = max(batch.lengths)
    output = language_model(module)(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
        sequence_lengths=batch.lengths,
    )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


@dataclass(eq=False)
class BoundModel:
    """The model of this rank. ``parameters`` has the same names in the same order on every rank, tied tensors once."""

    module: PreTrainedModel
    parameters: list[BoundParameter]
    untouched: tuple[str, ...]
    tp: TPGroup
    head_weight: nn.Parameter
    vocab: VocabShard
    gradient_sync: GradientSync
    attention_window: int = 0
    """Tokens of the widest window that a layer's attention has; 0 if none has one."""
    is_static: bool = False
    """True if the work on a micro-batch depends only on ``PackedBatch.structure``, so that it can be captured."""

    def reading_order(self) -> tuple[nn.Module, list[nn.Module], Tensor | None]:
        """The module that every forward pass calls, its decoder layers in order, and the head, which is read behind them;
        None if it is the embedding."""
        tied = self.head_weight.data_ptr() == self.module.get_input_embeddings().weight.data_ptr()
        return language_model(self.module), decoder_layers(self.module), None if tied else self.head_weight

    def _loss_tokens(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D], head [V_local, D] and targets int64 [N] of the N loss tokens: the head never sees others."""
        # index_select, since hidden[positions] would sort them in the backward pass
        hidden = final_hidden_states(self.module, batch).index_select(0, batch.loss_positions)
        return hidden, self.head_weight, batch.targets[batch.loss_positions]

    def forward_loss(self, batch: PackedBatch) -> LossSums:
        """The weighted negative log-likelihood of the micro-batch, summed. ``batch`` must be on the parameters' device.

        The backward pass can run once; the gradient of the head is computed here. Collective, as is the backward pass: the
        sums of the module's parallel regions, and those of ``loss.nll_sum``.
        """
        loss, correct = nll_sum(*self._loss_tokens(batch), batch.weights[batch.loss_positions], self.vocab)
        return LossSums(loss, correct.float().sum())

    def token_logprobs(self, batch: PackedBatch, inverse_temperature: Tensor | None = None) -> TokenLogprobs:
        """Log-probability and entropy of each loss token. ``inverse_temperature`` fp32 [T]: see ``loss.target_logprobs``.

        ``batch`` must be on the parameters' device. Collective: the sums of the module's parallel regions, and those of
        ``loss.logprobs_with_entropy``.
        """
        inverse = None if inverse_temperature is None else inverse_temperature[batch.loss_positions]
        return TokenLogprobs(*logprobs_with_entropy(*self._loss_tokens(batch), self.vocab, inverse))

    def sequence_logprobs(self, batch: PackedBatch, inverse_temperature: Tensor | None = None) -> SequenceLogprobs:
        """Per-token and per-sequence log-probabilities; under ``torch.no_grad`` nothing is kept for a backward pass.
        ``inverse_temperature`` as in ``token_logprobs``.

        ``batch`` must be on the parameters' device. Collective: the sums of the module's parallel regions, and those of
        ``loss.target_logprobs``.
        """
        inverse = None if inverse_temperature is None else inverse_temperature[batch.loss_positions]
        logprobs, correct = target_logprobs(*self._loss_tokens(batch), self.vocab, inverse)
        tokens = batch.weights.new_zeros(batch.num_tokens).index_put((batch.loss_positions,), logprobs)
        hits = torch.zeros_like(batch.weights).index_put((batch.loss_positions,), correct.float())
        sequence, zeros = batch.sequence_of_token(), tokens.new_zeros(len(batch.lengths))
        return SequenceLogprobs(
            tokens=tokens,
            sequences=zeros.index_add(0, sequence, batch.weights * tokens),
            correct=zeros.index_add(0, sequence, hits),
        )

    def finish_gradients(self, *, compare: bool = False) -> Tensor | None:
        """Once per optimizer step, after the last backward pass: complete the gradients that are partial sums, and give all
        ranks the same gradients of replicated tensors; with ``compare``, check that they were nearly the same before.
        Returns what ``Optimizer.step`` needs as ``received``.

        For collectives and the ReplicaError of ``compare`` see GradientSync.finish. Calling this twice in a step would count
        gradients twice.
        """
        return self.gradient_sync.finish(compare=compare)

    def zero_grad(self) -> None:
        """Drop all gradients, and what is left of a pass that raised. The device waits for this between steps, so it
        does not walk over the module's children."""
        for leaf in self.leaves:
            leaf.grad = None
        for joined in self._joined:
            joined.release()

    def widest_sum_bytes(self) -> int:
        """Bytes of one token in the largest sum over ranks within a layer: of a row-parallel product, or of the gradient of
        a column-parallel product's input."""
        rows = [m.weight for m in self.module.modules() if isinstance(m, RowParallelLinear)]
        sums = [(w.shape[0], w) for w in rows] + [(joined.weight.shape[1], joined.weight) for joined in self._joined]
        return max((width * weight.element_size() for width, weight in sums), default=0)

    @cached_property
    def leaves(self) -> list[nn.Parameter]:
        """The leaves that autograd accumulates the gradients of ``parameters`` in, each once, in the parameters' order."""
        return list({id(parameter.leaf): parameter.leaf for parameter in self.parameters}.values())

    @cached_property
    def _joined(self) -> list[JoinedLinear]:
        return [module for module in self.module.modules() if isinstance(module, JoinedLinear)]
