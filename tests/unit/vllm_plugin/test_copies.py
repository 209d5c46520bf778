"""Which tensors of a checkpoint are second copies of what the server loads, and which only look like it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from apollo_tp.shards.manifest import CheckpointTensor
from apollo_tp.shards.mapping import NAMES
from apollo_tp.vllm_plugin import copies
from apollo_tp.vllm_plugin.copies import second_copies

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (12, 4), generator=torch.Generator().manual_seed(seed)).bfloat16()


def _found(
    folder: Path,
    served: dict[str, Tensor],
    unserved: dict[str, Tensor],
    embeddings: tuple[str, ...] = (EMBEDDING,),
    *,
    tied: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Copies and refusals by name; what is not served lies in a file of its own."""
    listed = []
    for file, tensors in (("model-1.safetensors", served), ("model-2.safetensors", unserved)):
        save_file(tensors, folder / file)
        listed += [
            CheckpointTensor(name=n, shape=list(t.shape), dtype=NAMES[t.dtype], file=file) for n, t in tensors.items()
        ]
    found, refusals = second_copies(folder, listed, set(unserved), set(embeddings), tied=tied)
    return found, {refusal.name: refusal.reason for refusal in refusals}


@pytest.mark.parametrize("tied", [True, False])
def test_an_equal_head_is_told_whatever_the_config_says(tmp_path: Path, tied: bool) -> None:
    served = {EMBEDDING: _values(1), "model.layers.0.mlp.up_proj.weight": _values(2)}
    assert _found(tmp_path, served, {HEAD: _values(1)}, tied=tied) == ({HEAD: EMBEDDING}, {})


def test_a_head_that_the_server_ignores_is_the_embedding_if_the_server_ties_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Earlier vLLM drops a tied model's stored head: its values are not what is served. A server that neither loads it nor
    ties (one for pooling) is refused, as is one of which it is unclear what it ties."""
    logging.getLogger("vllm").propagate = True
    served = {EMBEDDING: _values(1)}
    assert _found(tmp_path, served, {HEAD: _values(2)}, tied=True) == ({HEAD: EMBEDDING}, {})
    assert "lm_head.weight is stored with other values than model.embed_tokens.weight" in caplog.text
    for tied, tensors, reason in (
        (False, {HEAD: _values(2)}, "the config does not tie it"),
        (True, {HEAD: _values(2, 16, 4)}, r"expected one embedding of its shape"),
    ):
        found, refused = _found(tmp_path, served, tensors, tied=tied)
        assert found == {}
        assert reason in refused[HEAD]


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "model.language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_heads_of_wrapped_models_are_told_by_name(tmp_path: Path, embedding: str, head: str, seed: int) -> None:
    """With the embedding's values, and with others."""
    found, refused = _found(tmp_path, {embedding: _values(1)}, {head: _values(seed)}, (embedding,), tied=True)
    assert (found, refused) == ({head: embedding}, {})


def test_copies_inside_prediction_layers_follow_their_like(tmp_path: Path) -> None:
    """Embedding and head that are apart and equal: each copy goes with the one that it is called after. Heads of prediction
    layers with values of their own stay what they are, tied or not."""
    served = {HEAD: _values(1), EMBEDDING: _values(1)}
    unserved = {
        "model.layers.9.embed_tokens.weight": _values(1),
        "model.layers.9.shared_head.head.weight": _values(1),
        "mtp.embed_tokens.weight": _values(1),
        "mtp.lm_head.weight": _values(1),
        "draft.lm_head.weight": _values(2),
        "mtp.fc.weight": _values(3),
    }
    expected = {
        "model.layers.9.embed_tokens.weight": EMBEDDING,
        "model.layers.9.shared_head.head.weight": HEAD,
        "mtp.embed_tokens.weight": EMBEDDING,
        "mtp.lm_head.weight": HEAD,
    }
    for tied in (False, True):
        assert _found(tmp_path, served, unserved, tied=tied) == (expected, {})


def test_what_is_equal_by_chance_is_no_copy(tmp_path: Path) -> None:
    """Norms of ones, biases of zeros, matrices of one number, and the same numbers in another dtype or shape."""
    served = {
        EMBEDDING: _values(1),
        "norm.weight": torch.ones(4),
        "up.bias": torch.zeros(12, dtype=torch.bfloat16),
        "up.weight": torch.zeros(12, 4, dtype=torch.bfloat16),
        "down.weight": torch.full((8, 4), 0.1),
        "vector": _values(4, 12),
    }
    unserved = {
        "mtp.norm.weight": torch.ones(4),
        "mtp.up.bias": torch.zeros(12, dtype=torch.bfloat16),
        "mtp.up.weight": torch.zeros(12, 4, dtype=torch.bfloat16),
        "mtp.down.weight": torch.full((8, 4), 0.1),
        "mtp.wide": _values(1).float(),
        "mtp.flat": _values(1).view(4, 12),
        "mtp.vector": _values(4, 12),
        "mtp.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    assert _found(tmp_path, served, unserved) == ({}, {})


@pytest.mark.parametrize("chunk_bytes", [1, 24, 16 * 1024**2])
@pytest.mark.parametrize("different", [None, 0, 5, 11])
def test_tensors_are_compared_to_their_last_row(
    tmp_path: Path, chunk_bytes: int, different: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of rows, also where many rows are alike; by bits, so that NaN equals itself and -0 is not 0."""
    monkeypatch.setattr(copies, "CHUNK_BYTES", chunk_bytes)
    matrix = torch.zeros(12, 4, dtype=torch.bfloat16)
    matrix[3, 2] = float("nan")
    copy = matrix.clone()
    if different is not None:
        copy[different, 3] = -0.0
    found, _ = _found(tmp_path, {"up.weight": matrix}, {"mtp.up.weight": copy})
    assert found == ({} if different is not None else {"mtp.up.weight": "up.weight"})


def test_a_folder_without_files_has_a_tied_head_at_most(tmp_path: Path) -> None:
    """A server started with dummy weights."""
    listed = [CheckpointTensor(name=name, shape=[12, 4], dtype="BF16") for name in (EMBEDDING, HEAD, "mtp.fc.weight")]
    found, refused = second_copies(tmp_path, listed, {HEAD, "mtp.fc.weight"}, {EMBEDDING}, tied=True)
    assert (found, refused) == ({HEAD: EMBEDDING}, [])
