"""Trace vLLM's loader without a server: one rank after the other in this process, on the CPU.

For ``python -m apollo_tp.inspect MODEL`` and for tests. vLLM builds its model for one rank of a tensor-parallel group that
does not exist; nothing communicates while a model is built and its loader is traced. Memory is reserved for the parameters
of one rank at a time and hardly touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.shards.manifest import Allocation, CheckpointTensor, Manifest
from apollo_tp.vllm_plugin.compat import config, cpu, one_rank, refusals, release
from apollo_tp.vllm_plugin.copies import StoredTensors
from apollo_tp.vllm_plugin.manifest_builder import (
    build_manifest,
    checkpoint_tensors,
    manifest_header,
    trace_checkpoint,
)


def offline_manifests(
    model: str, tp_size: int, dtype: str = "auto", *, trust_remote_code: bool = False
) -> list[Manifest]:
    """What the ranks of a server of the Hugging Face folder ``model`` at ``tp_size`` would publish, by rank.

    Allocations have no memory that could be mapped; a folder with only a config is enough. Raises whatever vLLM raises
    for a model that it cannot build, and UnsupportedModelError for one that is refused by its config.
    """
    release.check_version()
    cpu.prepare_offline()
    configs = (
        one_rank.engine_config(model, tp_size, dtype, trust_remote_code=trust_remote_code) for _ in range(tp_size)
    )
    checkpoint: list[CheckpointTensor] = []
    manifests = []
    for rank, vllm_config in enumerate(configs):
        if reasons := list(refusals.model_options(vllm_config)):  # before vLLM looks for kernels of this machine
            raise UnsupportedModelError(f"{model}: {'; '.join(reasons)}")
        header = manifest_header(vllm_config, rank, tp_size)
        # once, before a model is built: vLLM's Transformers backend changes transformers' classes for this process
        checkpoint = checkpoint or checkpoint_tensors(vllm_config, header)
        manifests.append(_manifest(vllm_config, header, checkpoint))
    return manifests


def _manifest(vllm_config: Any, header: dict[str, Any], checkpoint: list[CheckpointTensor]) -> Manifest:
    rank, size = header["tp_rank"], header["tp_size"]
    with one_rank.model_of_rank(vllm_config, rank, size) as model:
        _tie_what_a_server_ties(model, vllm_config.model_config, checkpoint, Path(header["model_path"]))
        error = "; ".join(refusals.refusals_of_server(vllm_config, model))
        return build_manifest(header, model, vllm_config.model_config, checkpoint, _unshared, error)


def _unshared(parameters: Sequence[Tensor], _held: object) -> list[tuple[int, Allocation]]:
    """One allocation for each parameter, by address, which cannot be mapped."""
    return [
        (p.data_ptr(), Allocation(kind="memfd", handle="", num_bytes=p.nbytes))
        for p in sorted(parameters, key=lambda p: p.data_ptr())
    ]


def _tie_what_a_server_ties(
    model: nn.Module, model_config: Any, checkpoint: list[CheckpointTensor], folder: Path
) -> None:
    """Tie head and embedding if their rows on this rank are equal. A server compares them once they are loaded; here
    nothing is loaded, so the files are compared."""
    untied = config.untied_head(model, model_config)
    if untied is None:
        return
    found = {
        copy.address: (tensor, copy.box)
        for tensor, trace in zip(checkpoint, trace_checkpoint(model, checkpoint), strict=True)
        for copy in trace.copies
    }
    ends = [found.get(layer.weight.data_ptr()) for layer in (untied.lm_head, untied.embed_tokens)]
    values = []
    with StoredTensors(folder) as stored:
        for tensor, box in (end for end in ends if end is not None):
            rows = stored.rows(tensor, box.offset[0], box.offset[0] + box.shape[0])
            values.append(rows.to(model_config.dtype))
    if not values or (len(values) == 2 and torch.equal(*values)):  # none: this rank has padding rows only
        untied.tie(model)
