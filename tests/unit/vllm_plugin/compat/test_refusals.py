"""Servers that are refused before anything is mapped, each with its reason and what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from apollo_tp.shards.instance import ENGINES_VARIABLE
from apollo_tp.vllm_plugin.compat.config import config_overrides
from apollo_tp.vllm_plugin.compat.refusals import refusals_of_server
from tests.support.vllm_configs import server


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_config": object()}, "LoRA-wrapped layers: serve without --enable-lora"),
        (
            {"parallel_config__pipeline_parallel_size": 2},
            "pipeline parallelism (2 stages): use tensor parallelism alone",
        ),
        (
            {"parallel_config__data_parallel_size": 2},
            "data parallelism of a mixture of experts (2 engines, which work in step): start one server per engine without "
            "--data-parallel-size, and train them with server.replicas",
        ),
        ({"parallel_config__enable_eplb": True}, "while the server runs; serve without --enable-eplb"),
        (
            {"parallel_config__prefill_context_parallel_size": 2},
            "prefill context parallelism (2 ranks): several workers have one tensor-parallel rank; serve without "
            "--prefill-context-parallel-size",
        ),
        (
            {"parallel_config__enable_expert_parallel": True},
            "expert parallelism: serve without --enable-expert-parallel",
        ),
        ({"model_config__hf_config__is_encoder_decoder": True}, "encoder-decoder model: only decoder-only models"),
        ({"model_config__quantization": "fp8"}, "quantised weights (fp8): serve the bf16 checkpoint"),
        (
            {"model_config__quantization": "gpt_oss_mxfp4"},
            "quantised weights (gpt_oss_mxfp4): serve the bf16 checkpoint; transformers makes it, with "
            "Mxfp4Config(dequantize=True)",
        ),
        ({"model_config__enable_sleep_mode": True}, "sleep mode (cumem allocator)"),
        ({"parallel_config__distributed_executor_backend": "ray"}, "serve with --distributed-executor-backend mp"),
        ({"parallel_config__distributed_executor_backend": type("E", (), {"uses_ray": True})}, "Ray: its actors"),
        ({"parallel_config__data_parallel_backend": "ray"}, "no --data-parallel-backend ray"),
    ],
)
def test_a_server_that_cannot_be_trained_is_refused_with_the_cure(changes: dict[str, Any], reason: str) -> None:
    found = refusals_of_server(server(**changes), nn.Module())
    assert len(found) == 1
    assert reason in found[0]


def test_weights_in_the_hosts_memory_are_refused_on_a_gpu() -> None:
    """With vLLM's own word for them, or by their device."""
    layer = nn.Linear(1, 1, device="meta")
    on_gpu = server(device_config__device="cuda")
    assert refusals_of_server(on_gpu, layer) == []
    layer.bias._vllm_is_uva_offloaded = True  # type: ignore[attr-defined]
    assert "--cpu-offload-gb" in refusals_of_server(on_gpu, layer)[0]
    assert "--cpu-offload-gb" in refusals_of_server(on_gpu, nn.Linear(1, 1))[0]
    assert refusals_of_server(server(), nn.Linear(1, 1)) == []


def test_reasons_are_listed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = refusals_of_server(server(lora_config=object(), model_config__quantization="fp8"), nn.Module())
    assert len(found) == 3


@pytest.mark.parametrize("executor", [None, "mp", "uni", type("E", (), {"uses_ray": False})])
def test_a_plain_server_is_not_refused(executor: Any) -> None:
    assert refusals_of_server(server(), nn.Module()) == []
    parallel = {"distributed_executor_backend": executor, "data_parallel_backend": "mp"}
    config = server(**{f"parallel_config__{name}": value for name, value in parallel.items()})
    assert refusals_of_server(config, nn.Module()) == []


@pytest.mark.parametrize("backend", ["FLASHINFER_CUTLASS", "triton"])
def test_backends_that_reorder_expert_weights_are_refused(backend: str) -> None:
    layer = nn.Module()
    layer.quant_method = SimpleNamespace(unquantized_backend=SimpleNamespace(value=backend))
    found = refusals_of_server(server(), layer)
    assert [backend in reason and "--moe-backend triton" in reason for reason in found] == [True] * (
        backend != "triton"
    )


@pytest.mark.parametrize(("dtype", "copied"), [("bfloat16", True), ("float16", False), ("bfloat16", False)])
def test_copies_of_attention_sinks_are_refused(dtype: str, copied: bool) -> None:
    """FlashInfer has one in float32 from the start, vLLM's CPU backend makes one of float16 sinks later."""
    layer = nn.Module()
    layer.sinks = nn.Parameter(torch.arange(4, dtype=getattr(torch, dtype)))
    layer.attn = nn.Module()
    layer.attn.impl = SimpleNamespace(sinks=layer.sinks.float() if copied else layer.sinks, workspace=torch.zeros(9))
    found = refusals_of_server(server(), layer)
    assert len(found) == (copied or dtype == "float16")
    assert all("sinks in SimpleNamespace: attention computes with a copy" in reason for reason in found)


@pytest.mark.parametrize("copied", [False, True])
def test_absorbed_matrices_that_are_no_views_are_refused(copied: bool) -> None:
    """vLLM has views of the weight, platforms of others have copies, which a write to the weight would not reach."""
    layer = nn.ModuleDict({"kv_b_proj": nn.Linear(8, 6, bias=False), "attn": nn.Module()})
    absorbed = layer["kv_b_proj"].weight.detach().T.view(8, 2, 3)[..., 1:].transpose(0, 1)
    layer["attn"].impl = SimpleNamespace()
    layer["attn"].W_UV = absorbed.contiguous() if copied else absorbed
    found = refusals_of_server(server(), layer)
    assert found == [] if not copied else "W_UV in SimpleNamespace: attention computes with a copy" in found[0]


def test_engines_that_can_be_told_apart_are_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the engines of a dense model vLLM says that each is the only one; without a number they would publish in each
    other's place."""
    monkeypatch.setenv(ENGINES_VARIABLE, "4")
    (reason,) = refusals_of_server(server(), nn.Module())
    assert "data parallelism (4 engines): this vLLM does not tell them apart; start one server per engine" in reason
    assert refusals_of_server(server(parallel_config__data_parallel_index=1), nn.Module()) == []


def test_overrides_of_the_config_are_passed_on_as_the_server_has_them() -> None:
    """What vLLM made of them, since it takes older names too; by a function they cannot be."""
    rope = {"rope_type": "yarn", "factor": 4.0}
    hf_config = SimpleNamespace(is_encoder_decoder=False, rope_parameters=rope, sliding_window=8, hidden_size=64)
    changes = {"model_config__hf_overrides": {"rope_scaling": rope, "sliding_window": 8, "dtype": "bfloat16"}}
    vllm_config = server(model_config__hf_config=hf_config, **changes)
    assert config_overrides(vllm_config.model_config) == {"rope_parameters": rope, "sliding_window": 8}
    assert refusals_of_server(vllm_config, nn.Module()) == []
    for value in (lambda config: config, {"text_config": {"sliding_window": 8}}):
        (reason,) = refusals_of_server(server(model_config__hf_overrides=value), nn.Module())
        assert "--hf-overrides" in reason
