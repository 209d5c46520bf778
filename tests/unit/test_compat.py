"""Servers that are refused before anything is mapped, each with its reason and its cure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from apollo_tp.vllm_plugin.compat import refusals_of_server


def server(**changes: Any) -> SimpleNamespace:
    """vLLM's config of a plain tensor-parallel server, but for ``changes``: "part__field" or "part"."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            quantization=None, use_mla=False, hf_config=SimpleNamespace(is_encoder_decoder=False)
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False),
        lora_config=None,
    )
    for name, value in changes.items():
        *parts, field = name.split("__")
        owner: Any = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, field, value)
    return config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_config": object()}, "LoRA-wrapped layers: serve without --enable-lora"),
        (
            {"parallel_config__pipeline_parallel_size": 2},
            "pipeline parallelism (2 stages): use tensor parallelism alone",
        ),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism (2 engines): start one server per engine"),
        (
            {"parallel_config__enable_expert_parallel": True},
            "expert parallelism: serve without --enable-expert-parallel",
        ),
        ({"model_config__use_mla": True}, "multi-head latent attention: vLLM serves derived copies of kv_b_proj"),
        ({"model_config__hf_config__is_encoder_decoder": True}, "encoder-decoder model: only decoder-only models"),
        ({"model_config__quantization": "fp8"}, "quantised weights (fp8): serve the bf16 checkpoint"),
        ({"model_config__enable_sleep_mode": True}, "sleep mode (cumem allocator)"),
    ],
)
def test_a_server_that_cannot_be_trained_is_refused_with_the_cure(changes: dict[str, Any], reason: str) -> None:
    found = refusals_of_server(server(**changes), nn.Module())
    assert len(found) == 1
    assert reason in found[0]


def test_reasons_are_listed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = refusals_of_server(server(lora_config=object(), model_config__use_mla=True), nn.Module())
    assert len(found) == 3


def test_a_plain_server_is_not_refused() -> None:
    assert refusals_of_server(server(), nn.Module()) == []


@pytest.mark.parametrize("backend", ["FLASHINFER_CUTLASS", "triton"])
def test_backends_that_reorder_expert_weights_are_refused(backend: str) -> None:
    layer = nn.Module()
    layer.quant_method = SimpleNamespace(unquantized_backend=SimpleNamespace(value=backend))
    found = refusals_of_server(server(), layer)
    assert [backend in reason and "--moe-backend triton" in reason for reason in found] == [True] * (
        backend != "triton"
    )
