"""Tensor-parallel (TP) products and the vocabulary-parallel embedding, together with their sums over the ranks.

Column-parallel: the sum of the input's gradient runs while the weight's gradient is computed, as Megatron-LM does it.
Row-parallel: the product is written where it is summed. Each is one operator, so that compiled code keeps the order of what
happens within.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo_tp.distributed.collectives import operator, reduce_from_region
from apollo_tp.distributed.tp_group import TPGroup, group_of
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.loss import VocabShard

MIN_PART_ROWS = 1024
"""Output rows from which a part of a joined product has products of its own in the backward pass, which saves copying
its gradient together with those of the other parts."""

ALONE = TPGroup.single()
"""The group of products outside of any parallel region."""


@operator(
    "column_backward(Tensor[] grads, Tensor x, Tensor weight, int number, Tensor? after=None) -> (Tensor, Tensor)"
)
def column_backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, number: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x @ weight.T`` from those of its parts: that of ``x``, summed over the group, and that of ``weight``.

    ``grads``: local [..., rows of a part] each, in order; they make up the rows of ``weight``, local [R, C]. ``x`` [..., C]
    is the same on all ranks. Returns [..., C], the same on all ranks, and local [R, C]. One all-reduce of [..., C] over the
    group with this number, while the weight's gradient is computed.
    """
    rows = [grad.shape[-1] for grad in grads]
    flat, flat_x = [grad.flatten(0, -2) for grad in grads], x.flatten(0, -2)
    grad_weight = torch.empty_like(weight)

    def multiply_weight() -> None:
        for grad, part in zip(flat, grad_weight.split(rows), strict=True):
            torch.mm(grad.T, flat_x, out=part)

    pairs = list(zip(flat, weight.split(rows), strict=True))
    grad_x = group_of(number).summed_products(pairs, alongside=multiply_weight)
    return grad_x.view(x.shape), grad_weight


@torch.library.register_fake("apollo_tp::column_backward")
def _(
    _grads: list[Tensor], x: Tensor, weight: Tensor, _number: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


@operator("row_parallel(Tensor x, Tensor weight, int number, Tensor? after=None) -> Tensor")
def row_parallel(x: Tensor, weight: Tensor, number: int, after: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` summed over the group with this number: local [..., C_local] and [R, C_local] give [..., R].

    One all-reduce of [..., R]; the result is the same on all ranks.
    """
    out = group_of(number).summed_products([(x.flatten(0, -2), weight.T)])
    return out.view(*x.shape[:-1], -1)


@torch.library.register_fake("apollo_tp::row_parallel")
def _(x: Tensor, weight: Tensor, _number: int, after: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operator("row_parallel_add(Tensor x, Tensor weight, Tensor residual, int number, Tensor? after=None) -> Tensor")
def row_parallel_add(x: Tensor, weight: Tensor, residual: Tensor, number: int, after: Tensor | None = None) -> Tensor:
    """``residual`` [..., R], the same on all ranks, plus what ``row_parallel`` returns. Used only in compiled code."""
    pairs = [(x.flatten(0, -2), weight.T)]
    return group_of(number).summed_products(pairs, residual=residual.flatten(0, -2)).view(residual.shape)


@torch.library.register_fake("apollo_tp::row_parallel_add")
def _(_x: Tensor, _weight: Tensor, residual: Tensor, _number: int, after: Tensor | None = None) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


SUMS = (column_backward, row_parallel, row_parallel_add)
"""The operators of this module, which sum over ranks, each once."""


class _ColumnParallel(torch.autograd.Function):
    """``column_parallel_linear`` without the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: tuple[int, ...], number: int, min_part_rows: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.is_divided, ctx.number = min(rows) >= min_part_rows, number
        return F.linear(x, weight).split(rows, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        parts = [grad.contiguous() for grad in grads] if ctx.is_divided else [torch.cat(grads, dim=-1)]
        return *column_backward(parts, x, weight, ctx.number), None, None, None


class _RowParallel(torch.autograd.Function):
    """``row_parallel_linear`` over more than one rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return row_parallel(x, weight, number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), None


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: tuple[int, ...],
    tp: TPGroup,
    min_part_rows: int = MIN_PART_ROWS,
) -> tuple[Tensor, ...]:
    """Enter a parallel region by a product: ``x`` [..., C], the same on all ranks, with ``weight`` local [R_local, C].

    Returns the product's parts of ``rows`` along the last dimension, local [..., rows of the part]; ``bias`` is local
    [R_local]. One all-reduce of x's gradient [..., C] in backward. Each part has products of its own there if none has fewer
    rows than ``min_part_rows``.
    """
    parts: tuple[Tensor, ...] = _ColumnParallel.apply(x, weight, rows, tp.number, min_part_rows)
    if bias is None:
        return parts
    return tuple(part + part_of_bias for part, part_of_bias in zip(parts, bias.split(rows), strict=True))


def row_parallel_linear(x: Tensor, weight: Tensor, tp: TPGroup) -> Tensor:
    """Leave a parallel region by a product: ``x`` local [..., C_local] with ``weight`` local [R, C_local].

    Returns [..., R], the same on all ranks. One all-reduce in forward, none in backward.
    """
    return F.linear(x, weight) if tp.size == 1 else _RowParallel.apply(x, weight, tp.number)  # type: ignore[no-any-return]


class VocabParallelEmbedding(nn.Module):
    """Embedding lookup over rows [start, start + V_local) of the vocabulary; a rank may have no rows.

    One sum all-reduce of the output in forward, none in backward. Keeps what the replaced module did: the scale of scaled
    embeddings, and no gradient for the lookups of a padding token.
    """

    def __init__(self, replaced: nn.Embedding, weight: nn.Parameter, vocab: VocabShard) -> None:
        """``weight`` is local [V_local, D]. Raises UnsupportedModelError for an embedding with a forward pass of its own."""
        super().__init__()
        self.weight = weight
        self.vocab = vocab
        self.padding_idx = replaced.padding_idx
        scale = getattr(replaced, "embed_scale", None)
        if scale is None and type(replaced).forward is not nn.Embedding.forward:
            raise UnsupportedModelError(f"{type(replaced).__name__}: got an embedding with an unknown forward pass")
        self.register_buffer("scale", None if scale is None else torch.as_tensor(scale), persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """``token_ids`` int64 [...], global ids, to [..., D] in the weight's dtype; both are the same on all ranks."""
        rows = self.weight.shape[0]
        local = token_ids - self.vocab.start
        owned = (local >= 0) & (local < rows)
        if rows:
            padding = None if self.padding_idx is None else self.padding_idx - self.vocab.start
            padding = padding if padding is not None and 0 <= padding < rows else None
            embedded = F.embedding(local.where(owned, 0), self.weight, padding) * owned[..., None]
        else:  # the sum of an empty weight is 0 and ties it into the graph, so that every rank runs the same backward
            embedded = self.weight.new_zeros((*token_ids.shape, self.weight.shape[1])) + self.weight.sum()
        embedded = reduce_from_region(embedded, self.vocab.tp)
        return embedded if self.scale is None else embedded * self.scale.to(embedded.dtype)
