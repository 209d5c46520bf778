"""Servers that are refused before anything is mapped, each with its reason and its cure."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apollo_tp.vllm_plugin.compat import engine
from apollo_tp.vllm_plugin.compat.config import config_overrides
from apollo_tp.vllm_plugin.compat.engine import Engine
from apollo_tp.vllm_plugin.compat.hooks import ENGINES_VARIABLE, has_endpoints, is_draft
from apollo_tp.vllm_plugin.compat.refusals import refusals_of_server
from apollo_tp.vllm_plugin.compat.rotary import yarn_refusals
from tests.support import rendered_chats


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


L4 = math.log(4)


class YaRNScalingRotaryEmbedding(nn.Module):
    """vLLM 0.26's, as far as its scale goes."""

    def __init__(self, scaling_factor: float, attn_factor: float = 1.0, extrapolation_factor: float = 1.0) -> None:
        super().__init__()
        self.scaling_factor, self.extrapolation_factor = scaling_factor, extrapolation_factor
        self.mscale = (0.1 * math.log(scaling_factor) + 1.0) * attn_factor


@pytest.mark.parametrize(
    ("fields", "options", "refused"),
    [
        ({}, {}, ""),
        ({"attention_factor": 0.1 * math.log(4) + 1.0}, {}, ""),
        ({"attention_factor": 1.0}, {}, "scales by 1.139, transformers by 1"),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {}, "scales by 1.139, transformers by 1"),
        ({"mscale": 1.0}, {}, ""),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, {}, "scales by 1.139, transformers by 1.122"),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, {}, "scales by 1.139, transformers by 0.9643"),
        # what a release that knows both fields scales by
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, {"attn_factor": (0.2 * L4 + 1) / (0.1 * L4 + 1) ** 2}, ""),
        ({}, {"attn_factor": 2.0}, "scales by 2.277, transformers by 1.139"),
        ({}, {"extrapolation_factor": 2.0}, "extrapolation_factor"),
    ],
)
def test_a_yarn_that_vllm_scales_otherwise_is_refused(
    fields: dict[str, Any], options: dict[str, Any], refused: str
) -> None:
    """vLLM 0.26 takes ``factor`` alone, and fields of its own; expected is what transformers itself computes."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64} | fields
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    module = YaRNScalingRotaryEmbedding(4.0, **options)
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    found = yarn_refusals(nn.ModuleList([module, nn.Linear(1, 1)]), config)
    assert refused in found[0] if refused else found == [], found
    assert (module.mscale == pytest.approx(scale)) == ("scales by" not in refused)
    nested = SimpleNamespace(rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default"}})
    assert yarn_refusals(module, nested) == found
    assert yarn_refusals(module, SimpleNamespace()) == [], "unknown to transformers: not compared"


def test_reasons_are_listed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = refusals_of_server(server(lora_config=object(), model_config__use_mla=True), nn.Module())
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


def test_each_engine_of_a_data_parallel_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the engines of a dense model vLLM says that each is the only one; they would publish in each other's place."""
    monkeypatch.setenv(ENGINES_VARIABLE, "4")
    assert "data parallelism (4 engines)" in refusals_of_server(server(), nn.Module())[0]
    monkeypatch.setenv(ENGINES_VARIABLE, "1")
    (second,) = refusals_of_server(server(parallel_config__data_parallel_index=1), nn.Module())
    assert "data parallelism" in second


def test_a_draft_model_is_not_taken_for_the_served_one() -> None:
    """vLLM loads one of method draft_model with a config that is all about the draft."""
    target, draft = object(), object()

    def config(model: object, **speculative: object) -> SimpleNamespace:
        return SimpleNamespace(
            model_config=model, speculative_config=SimpleNamespace(**speculative) if speculative else None
        )

    assert not is_draft(config(target), target)
    assert not is_draft(config(target, draft_model_config=draft, target_model_config=target), target)
    assert not is_draft(config(target, draft_model_config=target, target_model_config=target), target), "n-gram"
    assert is_draft(config(draft, draft_model_config=draft, target_model_config=target), draft), "draft_model"
    assert is_draft(config(target, draft_model_config=draft, target_model_config=target), draft), "EAGLE, MTP"


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


@pytest.mark.parametrize(("connector", "resets"), [(None, False), ("Mine", True), ("Mine", False)])
def test_a_connectors_cache_is_emptied_too(
    connector: str | None, resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is one: some releases answer that they could not reset what is not there."""
    monkeypatch.setattr(engine, "connector_resets", lambda _: resets)
    asked: list[dict[str, bool]] = []

    async def reset(**options: bool) -> bool:
        asked.append(options)
        return True

    transfer = SimpleNamespace(kv_connector=connector) if connector else None
    client = SimpleNamespace(
        pause_generation=None, resume_generation=None, vllm_config=SimpleNamespace(kv_transfer_config=transfer),
        reset_prefix_cache=reset,
    )  # fmt: skip
    if connector and not resets:
        with pytest.raises(RuntimeError, match="KV connector Mine cannot be emptied"):
            asyncio.run(Engine(client).reset_prefix_cache())
        assert asked == []
    else:
        asyncio.run(Engine(client).reset_prefix_cache())
        assert asked == [{"reset_running_requests": True} | ({"reset_connector": True} if connector else {})]


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/support/hooked_vllm.py found."""
    command = [sys.executable, "-m", "tests.support.hooked_vllm", str(tmp_path_factory.mktemp("hooked"))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_experts_on_a_cpu_are_served_plain_or_as_vllm_serves_them(hooked: dict[str, Any]) -> None:
    """bf16, in another order of summation; those of gpt-oss, with biases and an activation of their own, stay vLLM's."""
    difference, as_loaded, refusals = hooked["experts"]["qwen3-moe"]
    assert (difference < 0.01, as_loaded, refusals) == (True, True, [])
    difference, as_loaded, (refusal,) = hooked["experts"]["gpt-oss"]
    assert (difference, as_loaded) == (0.0, False)
    assert "got activation swigluoai with biases" in refusal


def test_convolutions_on_a_cpu_take_the_weight_as_loaded(hooked: dict[str, Any]) -> None:
    """vLLM tells its kernels that the weight is packed. They are told otherwise, and compute the same bits."""
    found = hooked["convolutions"]
    assert found["given"] == [[64, 4, False]] * 2
    if found["same"] is None:
        pytest.skip("vLLM packs these weights on CPUs with AVX512_BF16 alone")
    assert found["same"] == [True, True, True]


def test_all_requests_are_salted(hooked: dict[str, Any]) -> None:
    """Raw prompts, which vLLM prepares in a thread, rendered ones and ready requests; a salt of their own is left alone."""
    salts = ["first", "second", "None"]
    three = ["/".join([salt] * 3) for salt in salts]
    assert hooked["salts"] == {
        "raw": salts, "rendered": salts, "ready": salts, "three answers": three, "own salt": ["own"] * 3
    }  # fmt: skip


def test_models_of_other_loaders_are_followed_and_refused(hooked: dict[str, Any]) -> None:
    """tensorizer's, for one, does not call the method of all loaders; one that does is as good as vLLM's."""
    own = "--load-format mine: it does not load weights in vLLM's usual way; serve with --load-format auto"
    assert hooked["loaders"] == {"tensorizer": ["True"], "Usual": [""], "Own": [own], "Calls": [""]}


def test_a_connector_that_cannot_be_emptied_is_not_taken_for_emptied(hooked: dict[str, Any]) -> None:
    """vLLM asks it, and takes silence for yes."""
    assert hooked["connectors"] == {
        "OffloadingConnector": True, "ExampleConnector": False, "all of several": True, "one of several": False
    }  # fmt: skip


@pytest.mark.parametrize("server", rendered_chats.SERVERS)
def test_conversations_become_the_text_that_is_served(hooked: dict[str, Any], server: str) -> None:
    """Whatever template vLLM chose, in whatever form it takes contents, tools, reasoning and the developer's role."""
    for name, (by_vllm, by_us) in hooked["chats"][server].items():
        if server == "none":
            assert by_vllm.startswith("ChatTemplateResolutionError"), name
            assert "the served model has no chat template" in by_us, name
        else:
            assert by_us == by_vllm, name
            assert "<|im_start|>" in by_vllm, name


def test_the_default_of_a_chat_is_seen_and_its_own_wins(hooked: dict[str, Any]) -> None:
    """Had a template seen neither, the comparison above would say nothing of them."""
    chats = hooked["chats"]["defaults"]
    assert [chats[name][1][:5] for name in ("plain", "own", "automatic")] == ["null3", "nullé", "null3"]


def test_servers_that_render_otherwise_say_so(hooked: dict[str, Any]) -> None:
    """No template, no conversation; and the server goes on, whatever its tokenizer does."""
    expected = {
        "no tokenizer": "--skip-tokenizer-init",
        "gpt-oss": "by Harmony",
        "a renderer of its own": "by Other, not by a template",
        "a tokenizer's own": "by OwnTokenizer.apply_chat_template",
        "a tokenizer that fails": "vLLM could not say how it renders them (StopIteration:",
        "reserved": "--default-chat-template-kwargs sets tools, which are vLLM's own",
    }
    found = hooked["chat refusals"]
    assert all(text in found[name] for name, text in expected.items()), found


@pytest.mark.parametrize(
    ("context", "headless", "argv", "rust", "expected"),
    [
        ("OPENAI_API_SERVER", False, ["vllm", "serve"], "0", True),
        ("LLM_CLASS", False, ["x.py"], "0", False),
        ("OPENAI_API_SERVER", True, ["vllm", "serve"], "0", False),
        ("OPENAI_API_SERVER", False, ["vllm", "serve", "--grpc"], "0", False),
        ("OPENAI_API_SERVER", False, ["vllm", "serve"], "1", False),
        (None, False, ["x.py"], "0", False),
        ("OPENAI_API_SERVER", False, ["/vllm/entrypoints/openai/api_server.py"], "1", True),
        ("OPENAI_API_SERVER", False, ["/vllm/entrypoints/grpc_server.py"], "0", False),
    ],
)
def test_a_server_says_whether_its_api_will_tell_that_it_is_ready(
    context: str | None, headless: bool, argv: list[str], rust: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer waits for that, and must not wait for what never comes."""
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", rust)
    assert has_endpoints(context, headless) is expected
