"""vLLM's model for one rank of a tensor-parallel group that does not exist, built in this process without a server."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from apollo_tp.vllm_plugin.compat import cpu


def engine_config(model: str, tp_size: int, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """A new ``VllmConfig`` of an eager server of the folder ``model``. It remembers the layers that are built with it, so
    each rank needs one of its own."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # vLLM inspects a model class in a subprocess (10 s each) to keep CUDA out of the parent; nothing uses CUDA here.
    registry._run_in_subprocess = lambda function: function()
    arguments = EngineArgs(
        model=model,
        tensor_parallel_size=tp_size,
        dtype=dtype,
        enforce_eager=True,
        load_format="auto" if any(Path(model).glob("*.safetensors")) else "dummy",
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
    )
    cpu.choose_plain_latent_attention(arguments)
    return arguments.create_engine_config()


@contextlib.contextmanager
def model_of_rank(config: Any, rank: int, size: int) -> Iterator[nn.Module]:
    """vLLM's model as rank ``rank`` of ``size`` builds it, with uninitialised weights. Nothing communicates."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with pretended_rank(config, rank, size), set_default_torch_dtype(config.model_config.dtype):
        yield initialize_model(config)


class _PretendedGroup:
    """vLLM's coordinator of a group of one, with another rank and size."""

    def __init__(self, real: Any, rank: int, size: int) -> None:
        self._real = real
        self.rank_in_group = rank
        self.world_size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def pretended_rank(config: Any, rank: int, size: int) -> Iterator[None]:
    """Make vLLM believe that this process is ``rank`` of ``size`` in its tensor-parallel group."""
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
