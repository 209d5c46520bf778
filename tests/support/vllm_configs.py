"""vLLM's configuration as far as the plugin looks at it, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def server(**changes: Any) -> SimpleNamespace:
    """vLLM's config of a plain tensor-parallel server, but for ``changes``: "part__field" or "part"."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            quantization=None, use_mla=False, hf_config=SimpleNamespace(is_encoder_decoder=False)
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False),
        lora_config=None,
        device_config=SimpleNamespace(device="cpu"),
    )
    for name, value in changes.items():
        *parts, field = name.split("__")
        owner: Any = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, field, value)
    return config
