"""Trace vLLM's loader without a server: one rank after the other in this process, on the CPU.

For ``python -m apollo_tp.inspect MODEL`` and for tests. vLLM builds its model for one rank of a tensor-parallel group that
does not exist; nothing communicates while a model is built and its loader is traced. Memory is reserved for the parameters
of one rank at a time and hardly touched.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apollo_tp.shards.manifest import Allocation, CheckpointTensor, Manifest
from apollo_tp.shards.mapping import DTYPES
from apollo_tp.vllm_plugin import export
from apollo_tp.vllm_plugin.compat import versions as compat
from apollo_tp.vllm_plugin.compat.cpu import import_image_processors
from apollo_tp.vllm_plugin.copies import StoredTensors
from apollo_tp.vllm_plugin.trace import Trace, trace_loader


def offline_manifests(model: str, tp_size: int, dtype: str = "auto") -> list[Manifest]:
    """What the ranks of a server of the Hugging Face folder ``model`` at ``tp_size`` would publish, by rank.

    Allocations have no memory behind them; a folder with a config alone is enough. Raises whatever vLLM raises for a model
    that it cannot build.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    compat.check_version()
    import_image_processors()
    # vLLM looks at a model class in a subprocess (10 s each) to keep CUDA out of the parent; nothing uses CUDA here.
    registry._run_in_subprocess = lambda function: function()
    weights = "auto" if any(Path(model).glob("*.safetensors")) else "dummy"
    arguments = EngineArgs(
        model=model,
        tensor_parallel_size=tp_size,
        dtype=dtype,
        enforce_eager=True,
        load_format=weights,
        skip_tokenizer_init=True,
    )
    # A config remembers the layers that were built with it, hence a fresh one for each rank.
    return [_manifest(arguments.create_engine_config(), rank, tp_size) for rank in range(tp_size)]


def _manifest(config: Any, rank: int, size: int) -> Manifest:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    header = export._header(config, config.model_config, rank, size)
    checkpoint = export._checkpoint_tensors(config.model_config, config, header)
    with _rank_of(config, rank, size), set_default_torch_dtype(config.model_config.dtype):
        model: nn.Module = initialize_model(config)
        _tie_what_a_server_ties(model, config.model_config, checkpoint, Path(header["model_path"]))
        reasons = compat.refusals_of_server(config, model)
        unique, names = export._unique_parameters(model)
        allocations = [
            (p.data_ptr(), Allocation(kind="memfd", handle="", num_bytes=p.nbytes))
            for p in sorted(unique, key=lambda p: p.data_ptr())
        ]
        served = export._served_tensors(unique, names, allocations)
        traces = _trace(model, checkpoint)
        contents = export.contents(traces, checkpoint, model, config.model_config, unique, served, header)
    return Manifest(
        **header,
        allocations=[allocation for _, allocation in allocations],
        served=served,
        checkpoint=checkpoint,
        **contents,
        error="; ".join(reasons),
    )


def _trace(model: nn.Module, checkpoint: list[CheckpointTensor]) -> list[Trace]:
    return trace_loader(model, [(t.name, tuple(t.shape), DTYPES[t.dtype]) for t in checkpoint])


def _tie_what_a_server_ties(
    model: nn.Module, model_config: Any, checkpoint: list[CheckpointTensor], folder: Path
) -> None:
    """A server compares this rank's rows of head and embedding once they are loaded; here nothing is, so the files are."""
    untied = compat.untied_head(model, model_config)
    if untied is None:
        return
    found = {
        copy.address: (tensor, copy.box)
        for tensor, trace in zip(checkpoint, _trace(model, checkpoint), strict=True)
        for copy in trace.copies
    }
    ends = [found.get(layer.weight.data_ptr()) for layer in (untied.lm_head, untied.embed_tokens)]
    values = []
    with StoredTensors(folder) as stored:
        for tensor, box in (end for end in ends if end is not None):
            rows = stored.rows(tensor, box.offset[0], box.offset[0] + box.shape[0])
            values.append(rows.to(model_config.dtype))
    if not values or (len(values) == 2 and torch.equal(*values)):  # none: padding alone
        untied.tie(model)


class _PretendedGroup:
    """vLLM's coordinator of a group of one, but for its rank and size."""

    def __init__(self, real: Any, rank: int, size: int) -> None:
        self._real = real
        self.rank_in_group = rank
        self.world_size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def _rank_of(config: Any, rank: int, size: int) -> Iterator[None]:
    """Make vLLM believe that this process is ``rank`` of ``size``."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{Path(folder) / 'init'}",
            backend="gloo",
        )
        parallel_state.initialize_model_parallel(1)
        real = parallel_state._TP
        parallel_state._TP = _PretendedGroup(real, rank, size)
        try:
            yield
        finally:
            parallel_state._TP = real
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
