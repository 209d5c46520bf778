"""What the plugin's hooks do to real vLLM on a CPU: ``python -m tests.support.hooked_vllm FOLDER`` prints what it found.

A process of its own, because importing vLLM changes much.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from apollo_tp.vllm_plugin import memory
from apollo_tp.vllm_plugin.compat import cpu
from apollo_tp.vllm_plugin.compat.cpu import (
    choose_plain_latent_attention,
    serve_plain_convolutions,
    serve_plain_experts,
)
from apollo_tp.vllm_plugin.compat.engine import Engine, connector_resets
from apollo_tp.vllm_plugin.compat.hooks import install_hooks
from apollo_tp.vllm_plugin.compat.one_rank import pretended_rank
from apollo_tp.vllm_plugin.compat.refusals import layer_refusals, refusals_of_server
from apollo_tp.vllm_plugin.manifest_builder import _unique_parameters
from apollo_tp.vllm_plugin.views import held_tensors
from tests.support import rendered_chats
from tests.support.families import FAMILIES

TOKENS, CHOSEN = 5, 2


def gpt_oss() -> Any:
    """Experts with biases, and an activation of their own."""
    return AutoConfig.for_model(
        "gpt_oss", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=CHOSEN, max_position_embeddings=64,
        layer_types=["full_attention"], architectures=["GptOssForCausalLM"],
    )  # fmt: skip


def serve(config: Any) -> tuple[Tensor, bool, list[str]]:
    """The output of one layer of experts, whether its weights are as loaded, and why it cannot be trained."""
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    torch.manual_seed(0)
    with pretended_rank(config, 0, 1), set_default_torch_dtype(torch.bfloat16), torch.no_grad():
        model = initialize_model(config)
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        layer = next(module for module in model.modules() if hasattr(module, "w13_weight"))
        loaded = layer.w13_weight.clone()
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        hidden = torch.randn(TOKENS, layer.w2_weight.shape[1])
        output = torch.empty_like(hidden)
        layer.quant_method.moe_kernel.fused_experts.apply(
            output=output, hidden_states=hidden, w1=layer.w13_weight, w2=layer.w2_weight,
            topk_weights=torch.rand(TOKENS, CHOSEN, dtype=torch.float32),
            topk_ids=torch.stack([torch.randperm(len(loaded))[:CHOSEN] for _ in range(TOKENS)]).int(),
            activation=layer.activation, global_num_experts=len(loaded), expert_map=None, a1q_scale=None, a2_scale=None,
            workspace13=None, workspace2=None, expert_tokens_meta=None, apply_router_weight_on_input=False,
        )  # fmt: skip
        return output, torch.equal(layer.w13_weight, loaded), refusals_of_server(config, model)


def convolutions() -> dict[str, list[Any] | None]:
    """Both convolution kernels of gated delta nets as vLLM calls them, with packed weights and, after the hook, with plain
    ones: do the results agree bit for bit? None on CPUs for which vLLM does not pack. And what the kernels are given."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.manual_seed(0)
    channels, width, tokens = 64, 4, 7
    x, plain = torch.randn(tokens, channels).bfloat16(), torch.randn(channels, 1, width).bfloat16()
    slot = torch.tensor([0], dtype=torch.int32)

    def convolved(weight: Tensor) -> list[Tensor]:
        states = torch.zeros(1, width - 1, channels).bfloat16().transpose(1, 2)
        common = {
            "weight": weight, "bias": None, "conv_states": states, "silu_activation": True, "is_weight_packed": True
        }  # fmt: skip
        prefill = _custom_ops.causal_conv1d_fwd_cpu(
            x=x.t(), query_start_loc=torch.tensor([0, tokens], dtype=torch.int32), cache_indices=slot,
            has_initial_state=torch.tensor([False]), **common,
        )  # fmt: skip
        decode = _custom_ops.causal_conv1d_update_cpu(
            x=x[:1], conv_state_indices=slot, num_accepted_tokens=None, **common
        )
        return [prefill, decode, states]

    packs = torch.cpu._is_avx512_bf16_supported() and hasattr(_custom_ops, "causal_conv1d_weight_pack")
    before = convolved(_custom_ops.causal_conv1d_weight_pack(plain.view(channels, width))) if packs else None
    given: list[Any] = []
    names = ("causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu")
    originals = {name: getattr(_custom_ops, name) for name in names}
    for name in names:
        setattr(_custom_ops, name, lambda **o: given.append([*o["weight"].shape, o["is_weight_packed"]]))
    serve_plain_convolutions()
    convolved(plain)
    for name, original in originals.items():
        setattr(_custom_ops, name, original)
    serve_plain_convolutions()
    serve_plain_convolutions()
    after = convolved(plain) if packs else None
    same = None if before is None else [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    return {"given": given, "same": same}


async def sent_requests(config: Any) -> dict[str, list[str | None]]:
    """The cache salts that reach vLLM's engine, by the way that a request is made."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    client: Any = object.__new__(AsyncLLM)
    sent: list[Any] = []

    async def add_request_async(request: Any) -> None:
        sent.append(request)

    vars(client).update(
        vllm_config=config, model_config=config.model_config, observability_config=config.observability_config,
        scheduler_config=config.scheduler_config, input_processor=InputProcessor(config), log_requests=False,
        output_processor=OutputProcessor(None, log_stats=False), output_handler=None, admission_stats=None,
        _supported_tasks=("generate",), _run_output_handler=lambda: None,
        engine_core=SimpleNamespace(
            add_request_async=add_request_async, resources=SimpleNamespace(engine_dead=False), shutdown=lambda **_: None
        ),
    )  # fmt: skip
    engine = Engine(client)
    raw, rendered = {"prompt_token_ids": [1, 2]}, {"type": "token", "prompt_token_ids": [1, 2]}
    salts = {}
    for salt in ("first", "second", ""):
        engine.salt_requests(salt)
        params = SamplingParams(detokenize=False)
        ready = client.input_processor.process_inputs("ready", rendered, params, ("generate",))
        prompts = {
            "raw": (raw, params),
            "rendered": (rendered, params),
            "ready": (ready, params),
            "three answers": (raw, SamplingParams(detokenize=False, n=3)),
            "own salt": (raw | {"cache_salt": "own"}, params),
        }
        for name, (prompt, its_params) in prompts.items():
            sent.clear()
            await client.add_request(f"{name} {salt}", prompt, its_params)
            salts.setdefault(name, []).append("/".join(str(request.cache_salt) for request in sent))
    return salts


def followed_loaders() -> dict[str, list[str]]:
    """What the plugin reports of each model that is loaded, by loaders of vLLM's and by others."""
    from vllm.model_executor.model_loader import TensorizerLoader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Usual(BaseModelLoader):
        download_model = load_weights = None

    class Own(Usual):
        def load_model(self, vllm_config: Any, model_config: Any) -> nn.Module:
            return nn.Linear(1, 1)

    class Calls(Usual):
        def load_model(self, vllm_config: Any, model_config: Any) -> nn.Module:
            return super().load_model(vllm_config, model_config)

    BaseModelLoader.load_model = lambda self, vllm_config, model_config: nn.Linear(1, 1)
    reported: list[str] = []
    install_hooks(lambda model, *_: reported.append("; ".join(layer_refusals(model))))
    install_hooks(lambda *_: reported.append("installed twice"))
    model_config = object()
    config = SimpleNamespace(model_config=model_config, load_config=SimpleNamespace(load_format="mine"))
    found = {"tensorizer": [str(hasattr(TensorizerLoader.load_model, "apollo_tp"))]}
    for loader in (Usual, Own, Calls):
        reported.clear()
        loader.__new__(loader).load_model(vllm_config=config, model_config=model_config)
        found[loader.__name__] = list(reported)
    return found


def emptied_connectors() -> dict[str, bool]:
    """Which of vLLM's KV connectors can be emptied."""
    from vllm.config import KVTransferConfig

    def resets(name: str, *parts: str) -> bool:
        extra = {"connectors": [{"kv_connector": part, "kv_role": "kv_both"} for part in parts]}
        return connector_resets(KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra))

    both = ("OffloadingConnector", "ExampleConnector")
    found = {name: resets(name) for name in both}
    return found | {
        "all of several": resets("MultiConnector", both[0]),
        "one of several": resets("MultiConnector", *both),
    }


def followed_weight(config: Any) -> dict[str, Any]:
    """Whether what vLLM makes of ``kv_b_proj`` is what it would make of it again, once the weight is shared and changed."""
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    with pretended_rank(config, 0, 1), set_default_torch_dtype(torch.bfloat16), torch.no_grad():
        model = initialize_model(config)
        for parameter in model.parameters():
            parameter.normal_()
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        parameters, names = _unique_parameters(model)
        held = [tensor for module in model.modules() for _, tensor in held_tensors(module)]
        memory.share(parameters, held, device=torch.device("cpu"))
        layer = next(module for module in model.modules() if hasattr(module, "W_UV"))
        layer.kv_b_proj.weight.normal_()
        found = [layer.W_UV, layer.W_UK_T]
        del layer.W_UV, layer.W_UK_T
        layer.process_weights_after_loading(torch.bfloat16)
        again = [layer.W_UV, layer.W_UK_T]
    served = [name for group in names for name in group if "W_U" in name]
    same = [torch.equal(*pair) for pair in zip(found, again, strict=True)]
    return {"same": same, "served": served, "refusals": refusals_of_server(config, model)}


def backend_with_amx(model: Path) -> str:
    """The backend of latent attention that the plugin chooses on a CPU with AMX, pretended here."""
    from vllm.engine.arg_utils import EngineArgs

    own, torch.cpu._is_amx_tile_supported = torch.cpu._is_amx_tile_supported, lambda: True
    arguments = EngineArgs(model=str(model))
    choose_plain_latent_attention(arguments)
    torch.cpu._is_amx_tile_supported = own
    return arguments.attention_backend.name if arguments.attention_backend else ""


def main(folder: Path) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    def engine_config(name: str) -> Any:
        arguments = EngineArgs(
            model=str(folder / name),
            dtype="bfloat16",
            enforce_eager=True,
            load_format="dummy",
            skip_tokenizer_init=True,
        )
        choose_plain_latent_attention(arguments)
        return arguments.create_engine_config()

    FAMILIES["deepseek-v3"].config(architectures=["DeepseekV3ForCausalLM"]).save_pretrained(folder / "deepseek")
    configs = {"gpt-oss": gpt_oss(), "qwen3-moe": FAMILIES["qwen3-moe"].config(architectures=["Qwen3MoeForCausalLM"])}
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    without = {name: serve(engine_config(name))[0].float() for name in configs}
    serve_plain_experts()
    serve_plain_experts()  # vLLM loads plugins more than once

    def compare(name: str, before: Tensor) -> list[Any]:
        output, as_loaded, refusals = serve(engine_config(name))
        return [float((output.float() - before).norm() / before.norm()), as_loaded, refusals]

    experts = {name: compare(name, before) for name, before in without.items()}
    del cpu._ACTIVATIONS["swigluoai"]
    experts["unknown"] = compare("gpt-oss", without["gpt-oss"])
    return {
        "experts": experts,
        "latent attention": followed_weight(engine_config("deepseek")),
        "backend with AMX": backend_with_amx(folder / "deepseek"),
        "convolutions": convolutions(),
        "salts": asyncio.run(sent_requests(engine_config("qwen3-moe"))),
        "loaders": followed_loaders(),
        "connectors": emptied_connectors(),
        "chats": rendered_chats.rendered(folder / "chats", engine_config("qwen3-moe").model_config),
        "chat refusals": rendered_chats.refusals(folder / "plain", engine_config("qwen3-moe").model_config),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
