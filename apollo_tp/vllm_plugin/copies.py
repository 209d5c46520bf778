"""Checkpoint tensors that the server does not load because they are second copies of tensors that it does load.

A tied model may be stored with its output head in addition to its embedding (Qwen3-0.6B; what FSDP tools save), and layers
for multi-token prediction with an embedding and a head of their own. Once the first copy is trained, the second must be
written with the same values: a folder with a trained embedding and an old head is another model, since vLLM 0.32 and
transformers untie a head that differs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apollo_tp.shards.manifest import CheckpointTensor, Refusal

logger = logging.getLogger("vllm.apollo_tp")

HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of the output head in checkpoints, after the name of the model that it belongs to."""
CHUNK_BYTES = 16 * 1024**2


def second_copies(
    folder: Path,
    checkpoint: Sequence[CheckpointTensor],
    not_served: Collection[str],
    embeddings: Collection[str],
    *,
    tied: bool,
) -> tuple[dict[str, str], list[Refusal]]:
    """For each tensor of ``not_served`` that is a second copy, the name of the served tensor; and refusals for tensors of
    which it cannot be known.

    ``embeddings`` are the names of the served embeddings of the vocabulary; ``tied`` says whether the server uses one as its
    head. A head that is stored in addition is a copy of it whatever its values are, since nothing that is served depends on
    them. Any other tensor is a copy if it has the bits of a served tensor and two dimensions or more, and is not constant:
    norm weights of ones are equal by chance.
    """
    served = [tensor for tensor in checkpoint if tensor.name not in not_served]
    embedding = [tensor for tensor in served if tensor.name in embeddings]
    copies: dict[str, str] = {}
    refusals: list[Refusal] = []
    with StoredTensors(folder) as stored:
        found = _equal_matrices([t for t in checkpoint if t.name in not_served], served, stored)
        for tensor in (t for t in checkpoint if t.name in not_served):
            originals = found.get(tensor.name, [])
            if originals:
                copies[tensor.name] = max(originals, key=lambda name: _common_end(name, tensor.name))
            elif _is_head(tensor.name, embeddings):
                fitting = [other for other in embedding if other.shape == tensor.shape]
                if tied and len(fitting) == 1:
                    copies[tensor.name] = fitting[0].name
                    _warn_of_another_head(tensor, fitting[0])
                else:
                    refusals.append(Refusal(name=tensor.name, reason=_unclear_head(tied, embedding)))
    return copies, refusals


def _is_head(name: str, embeddings: Collection[str]) -> bool:
    """Whether ``name`` is the head of the model that these embeddings belong to, not of a layer or a draft inside it."""
    if not name.endswith(HEADS):
        return False
    around = set(name.split(".")[:-2])
    return not around or any(around <= set(embedding.split(".")) for embedding in embeddings)


def _warn_of_another_head(head: CheckpointTensor, embedding: CheckpointTensor) -> None:
    if head.file:  # else nothing is stored
        logger.warning(
            "apollo_tp: %s is stored with other values than %s, which the server uses as its head: the stored head is not "
            "what is served, and checkpoints have the embedding's values in its place", head.name, embedding.name,
        )  # fmt: skip


def _unclear_head(tied: bool, embeddings: Sequence[CheckpointTensor]) -> str:
    if not tied:
        return "the server does not load this head, expected it to, since the config does not tie it to the embedding"
    shapes = {embedding.name: embedding.shape for embedding in embeddings}
    return f"the server does not load this head, expected one embedding of its shape in place of it, got {shapes}"


def _common_end(one: str, other: str) -> int:
    """The length of the common end of two names. Where embedding and head have the same values, a copy is assigned to the
    one whose name ends in the same way: an embedding to the embedding, a head to the head."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _equal_matrices(
    unserved: Sequence[CheckpointTensor], served: Sequence[CheckpointTensor], stored: StoredTensors
) -> dict[str, list[str]]:
    """For each tensor of ``unserved``, the served tensors with the same shape, dtype and bits. Reads the first row of each
    candidate, and all rows, in chunks, where the first ones are equal."""
    kinds: dict[tuple[Any, ...], dict[bytes, list[CheckpointTensor]]] = {}
    for tensor in unserved:
        if len(tensor.shape) > 1 and 0 not in tensor.shape and tensor.file:
            rows = kinds.setdefault((*tensor.shape, tensor.dtype), {})
            rows.setdefault(stored.first_row(tensor), []).append(tensor)
    found: dict[str, list[str]] = {}
    for original in served:
        rows = kinds.get((*original.shape, original.dtype), {})
        for tensor in rows.get(stored.first_row(original), []) if rows else []:
            if stored.equal_and_not_constant(tensor, original):
                found.setdefault(tensor.name, []).append(original.name)
    return found


class StoredTensors:
    """Reads parts of a folder's safetensors; each file is opened once, and none is read in full."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, dict[str, Any]()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._stack.close()

    def rows(self, tensor: CheckpointTensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (global, exclusive) in the stored dtype."""
        from safetensors import safe_open

        if tensor.file not in self._files:
            opened = safe_open(self._folder / tensor.file, framework="pt")
            self._files[tensor.file] = self._stack.enter_context(opened)
        return self._files[tensor.file].get_slice(tensor.name)[start:stop]  # type: ignore[no-any-return]

    def first_row(self, tensor: CheckpointTensor) -> bytes:
        """The bits of the first row."""
        return self.rows(tensor, 0, 1).contiguous().view(torch.uint8).numpy().tobytes()

    def equal_and_not_constant(self, one: CheckpointTensor, other: CheckpointTensor) -> bool:
        """Whether two tensors of the same shape and dtype have the same bits and more than one distinct value."""
        first, constant = self.rows(one, 0, 1).flatten()[:1].view(torch.uint8), True
        for start, stop in self._chunks(one):
            mine, its = (self.rows(tensor, start, stop).contiguous().view(torch.uint8) for tensor in (one, other))
            if not torch.equal(mine, its):
                return False
            constant = constant and bool((mine.view(-1, len(first)) == first).all())
        return not constant

    def _chunks(self, tensor: CheckpointTensor) -> Iterator[tuple[int, int]]:
        count = tensor.shape[0]
        step = max(1, CHUNK_BYTES // max(1, self.rows(tensor, 0, 1).nbytes))
        return ((start, min(start + step, count)) for start in range(0, count, step))
