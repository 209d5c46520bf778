"""The vocabulary-parallel embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo_tp.distributed.collectives import reduce_from_region
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.model.loss import VocabShard


class VocabParallelEmbedding(nn.Module):
    """Embedding lookup over rows [start, start + v) of the vocabulary, v >= 0 rows on this rank.

    One sum all-reduce of the output forward, none backward. Keeps what the replaced module did: the scale of scaled
    embeddings, and no gradient for the lookups of a padding token.
    """

    def __init__(self, replaced: nn.Embedding, weight: nn.Parameter, vocab: VocabShard) -> None:
        super().__init__()
        self.weight = weight
        self.vocab = vocab
        self.padding_idx = replaced.padding_idx
        scale = getattr(replaced, "embed_scale", None)
        if scale is None and type(replaced).forward is not nn.Embedding.forward:
            raise UnsupportedModelError(f"{type(replaced).__name__}: got an embedding with an unknown forward pass")
        self.register_buffer("scale", None if scale is None else torch.as_tensor(scale), persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
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
