"""What bind_model refuses, and properties of a bound model that one process shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import UnsupportedModelError
from apollo_tp.inspect.exactness import reference_gradients, relative_error, samples, train_gradients
from apollo_tp.model import bind, bind_model, regions
from apollo_tp.model.batch import pack
from apollo_tp.model.boundaries import needs_hook
from apollo_tp.model.build import build_on_meta, narrow_config, refusing
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.model.names import NameMap, map_names
from apollo_tp.shards.boxes import Shard
from apollo_tp.wire.commands import Sample
from tests.support.families import FAMILIES, REFUSED, Family, build
from tests.support.whole_shards import whole_shards

WHOLE = TPGroup.single()


def test_one_error_lists_all_that_does_not_fit() -> None:
    """Missing, unknown and ill-shaped tensors are all named at once, with shapes and the cure."""
    config = FAMILIES["llama"].config()
    shards = whole_shards(build(config))
    del shards["model.layers.0.mlp.up_proj.weight"]
    shards["model.layers.0.mlp.side_proj.weight"] = shards["model.layers.0.mlp.gate_proj.weight"]
    norm = "model.layers.1.input_layernorm.weight"
    shards[norm] = (Shard(norm, (63,), None, (), (0,)), torch.ones(63))
    wrong_view = "model.layers.1.mlp.down_proj.weight"
    shards[wrong_view] = (shards[wrong_view][0], torch.ones(3, 3))
    with pytest.raises(UnsupportedModelError) as caught:
        bind_model(config, shards, WHOLE)
    message = str(caught.value)
    assert "rank 0 of 1: 4 tensors do not fit LlamaForCausalLM" in message
    assert "model.layers.0.mlp.up_proj.weight: the model has this parameter, but no checkpoint tensor" in message
    assert "model.layers.0.mlp.side_proj.weight: LlamaForCausalLM has no parameter for it" in message
    assert f"{norm}: got local shape (63,), expected (64,)" in message
    assert f"{wrong_view}: got {wrong_view} of local shape (3, 3), its shard says (64, 96)" in message


def test_experts_that_do_not_lie_stacked_are_refused() -> None:
    """One parameter over all experts needs them side by side; a copy would cut the tie to the served memory."""
    config = FAMILIES["qwen3-moe"].config()
    shards = whole_shards(build(config))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    shards[name] = (shards[name][0], shards[name][1].clone())
    with pytest.raises(UnsupportedModelError, match=r"experts.2.up_proj.weight .* --moe-backend triton"):
        bind_model(config, shards, WHOLE)


def test_a_width_that_does_not_divide_is_refused() -> None:
    config = FAMILIES["llama"].config(num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    with pytest.raises(UnsupportedModelError, match=r"num_attention_heads: got 6, expected a multiple of .* 4"):
        narrow_config(config, 4)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_supported_is_refused_before_the_first_step(model_type: str) -> None:
    """Families whose numbers would silently differ are refused by name when the model is bound."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    config = AutoConfig.for_model(model_type, **sizes)
    embedding = (Shard("model.embed_tokens.weight", (128, 64), None, (), (0,)), torch.ones(128, 64))
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        bind_model(config, {"model.embed_tokens.weight": embedding}, WHOLE)


def test_a_config_without_attention_is_refused() -> None:
    """Mamba has no heads to divide."""
    with pytest.raises(UnsupportedModelError, match=r"mamba at 1 / 2 .*AttributeError: .*num_attention_heads"):
        build_on_meta(AutoConfig.for_model("mamba"), 2, torch.float32)


def test_a_device_that_is_full_is_no_property_of_the_model() -> None:
    with pytest.raises(torch.OutOfMemoryError), refusing("a model"):
        raise torch.OutOfMemoryError("full")


def test_layers_that_keep_the_boundaries_to_themselves_are_not_compiled() -> None:
    """StableLM's decoder layer takes the keywords of a forward pass and does not hand them to its attention: a hook does,
    and what it keeps is no input of a compiled layer."""
    config = Family("stablelm").config()
    shards = whole_shards(build(config))
    bound = bind_model(config, shards, WHOLE, compiled=CompileOptions(backend="eager"))
    assert not bound.is_static
    layers = [module for module in bound.module.modules() if type(module).__name__ == "StableLmDecoderLayer"]
    assert [needs_hook(layer) for layer in layers] == [True, True]
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_served_tensor_that_nothing_is_trained_from_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names for one parameter: only one of them is bound."""
    config = FAMILIES["llama"].config()
    shards = whole_shards(build(config))
    shards["alias.weight"] = (Shard("alias.weight", (64,), None, (), (0,)), torch.ones(64))

    def with_alias(*args: object) -> NameMap:
        names = map_names(*args)  # type: ignore[arg-type]
        return replace(names, refused={}, parts=names.parts | {"model.alias.weight": [["alias.weight"]]})

    monkeypatch.setattr(bind, "map_names", with_alias)
    with pytest.raises(UnsupportedModelError, match=r"1 tensors do not fit .*\n  alias.weight: got it served"):
        bind_model(config, shards, WHOLE)


def _cut_in_two(model: PreTrainedModel, rank: int) -> dict[str, tuple[Shard, torch.Tensor]]:
    """As vLLM's Transformers backend serves it at TP = 2: each tensor cut in one piece, fused ones too."""
    local = build_on_meta(model.config, 2, torch.float32).state_dict()
    shards = {}
    for name, tensor in model.named_parameters():
        cut = [d for d, n in enumerate(local[name].shape) if n != tensor.shape[d]]
        if not cut:
            shards[name] = (Shard(name, tuple(tensor.shape), None, (), (0, 1)), tensor.detach())
            continue
        part = tensor.detach().chunk(2, cut[0])[rank]
        start = rank * part.shape[cut[0]]
        ranges = ((start, start + part.shape[cut[0]]),)
        shards[name] = (Shard(name, tuple(tensor.shape), cut[0], ranges, (rank,)), part)
    return shards


@pytest.mark.parametrize(("rank", "got", "expected"), [(0, "0:96", "0:48, 96:144"), (1, "96:192", "48:96, 144:192")])
def test_a_fused_tensor_cut_across_its_parts_is_refused(rank: int, got: str, expected: str) -> None:
    """All gate rows on one rank and all up rows on the other: the shapes are those that silu(gate) * up needs."""
    model = build(Family("glm", {"head_dim": 16, "pad_token_id": 0}).config())
    with pytest.raises(UnsupportedModelError) as caught:
        bind_model(model.config, _cut_in_two(model, rank), TPGroup(rank, 2))
    message = str(caught.value)
    assert f"rank {rank} of 2: 2 fused tensors of GlmForCausalLM are served cut across their parts" in message
    assert (
        f"model.layers.1.mlp.gate_up_proj.weight: got {got} of 192 along dimension 0, expected {expected}," in message
    )


def test_a_norm_over_all_heads_that_the_table_does_not_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight is served cut, and fits: with this rank's heads alone it would divide by another mean square."""
    model = build(FAMILIES["olmo2"].config(num_key_value_heads=4))
    shards = _cut_in_two(model, 0)
    monkeypatch.setattr(regions, "FULL_WIDTH_NORMS", {})
    with pytest.raises(UnsupportedModelError) as caught:
        bind_model(model.config, shards, TPGroup(0, 2))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("rank 0 of 2: got 4 weights cut over ranks whose modules need the channels of all")
    assert (
        "  model.layers.0.self_attn.q_norm.weight (Olmo2RMSNorm): cut on dimension 0, over which it normalises" in lines
    )


class _Scale(torch.nn.Module):
    """A factor for each channel, which may be cut anywhere; ``forward`` is what a test needs."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 8))
        self.compute = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.compute(x)


@pytest.mark.parametrize(
    ("forward", "dim", "refused"),
    [
        (lambda x: x, 0, None),
        (lambda x: x, 1, None),
        (lambda x: torch.nn.functional.layer_norm(x, (8,)), 0, None),
        (lambda x: torch.nn.functional.layer_norm(x, (8,)), 1, "cut on dimension 1, over which it normalises"),
        (lambda x: x / x.amax((-2, -1), keepdim=True), 0, "cut on dimension 0, over which it normalises"),
        (lambda x: x @ torch.ones(3, 3), 0, "which is cut on dimension 0, could not be tried: got RuntimeError"),
    ],
)
def test_a_module_is_tried_over_the_dimension_that_is_cut(
    forward: Callable[[torch.Tensor], torch.Tensor], dim: int, refused: str | None
) -> None:
    """Whatever it is called: norms of each head by itself and factors pass."""
    module = torch.nn.ModuleDict({"any": _Scale(forward)})
    shards = {"any.weight": Shard("w", ((8, 8), (4, 16))[dim], dim, ((0, (4, 8)[dim]),), (0,))}
    if refused is None:
        regions.refuse_mixed_channels(module, shards, TPGroup(0, 2))
        return
    with pytest.raises(UnsupportedModelError, match=refused):
        regions.refuse_mixed_channels(module, shards, TPGroup(0, 2))


SAME_FUNCTION = {
    "a head under another name than lm_head": Family("gpt_neox", {"rotary_pct": 0.25}),
    "noise in routers and their input": Family(
        "phimoe", {"num_local_experts": 4, "input_jitter_noise": 0.3, "lm_head_bias": False}
    ),
    "noise in a router": Family(
        "mixtral", {"num_local_experts": 4, "sliding_window": None, "router_jitter_noise": 0.3}
    ),
    "boundaries that a layer keeps to itself": Family("stablelm", {"use_qkv_bias": True}),
    "dropout": Family("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", SAME_FUNCTION)
def test_loss_and_gradients_are_those_of_the_model_that_is_served(case: str, checkpointing: bool) -> None:
    """Evaluated without noise, and with every tensor that is served trained as what it is."""
    family = SAME_FUNCTION[case]
    model = build(family.config())
    loss, expected = reference_gradients(model, samples())
    bound = bind_model(family.config(), whole_shards(model), WHOLE, gradient_checkpointing=checkpointing)
    assert train_gradients(bound, pack(samples(), 256)) == pytest.approx(loss, rel=1e-6)
    assert {parameter.name for parameter in bound.parameters} == set(expected)
    for parameter in bound.parameters:
        assert parameter.grad is not None
        whole = expected[parameter.name]
        assert relative_error(parameter.grad, whole, whole) < family.tolerance, parameter.name


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "gemma2", "qwen3-next", "qwen3.5", "nemotron"])
def test_nothing_leaks_between_packed_sequences(family: str) -> None:
    """Log-probabilities of a sequence do not change by a bit when its neighbours in the pack do."""
    config = FAMILIES[family].config()
    bound = bind_model(config, whole_shards(build(config)), WHOLE)

    def of_the_middle_one(seed: int) -> torch.Tensor:
        around = samples(seed=seed, lengths=(33, 21, 40))
        middle = samples(seed=7, lengths=(21,))[0]
        (batch,) = pack([around[0], middle, around[2]], 256)
        with torch.no_grad():
            tokens = bound.sequence_logprobs(batch).tokens
        return tokens[33 : 33 + 21]

    first, second = of_the_middle_one(1), of_the_middle_one(2)
    assert first.any()
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_an_expert_without_tokens_has_an_exactly_zero_gradient(family: str) -> None:
    """An exactly zero gradient is what tells the optimizer to leave a matrix and its state alone."""
    config = FAMILIES[family].config()
    bound = bind_model(config, whole_shards(build(config)), WHOLE)
    train_gradients(bound, pack([Sample([5, 6], [0.0, 1.0])], 64))  # 2 tokens x 2 of 4 experts: some may get none
    routed = {}
    for parameter in bound.parameters:
        if ".experts." in parameter.name:
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shard.local_shape
            expert = parameter.name.rsplit(".", 2)[0]
            routed.setdefault(expert, set()).add(bool(parameter.grad.any()))
    assert all(len(kinds) == 1 for kinds in routed.values()), "all matrices of an expert get tokens, or none does"
    assert {True, False} <= {kind for kinds in routed.values() for kind in kinds}


def test_fp32_parameters_stay_fp32_in_a_bf16_model() -> None:
    """vLLM serves A_log in fp32 within a bf16 model: it is trained as it is served."""
    config = FAMILIES["qwen3.5"].config()
    model = build(config).to(torch.bfloat16)
    shards = {
        name: (shard, tensor.float() if name.endswith("A_log") else tensor)
        for name, (shard, tensor) in whole_shards(model).items()
    }
    bound = bind_model(config, shards, WHOLE)
    train_gradients(bound, pack(samples(), 256))
    for parameter in bound.parameters:
        expected = torch.float32 if parameter.name.endswith("A_log") else torch.bfloat16
        assert parameter.tensor.dtype == expected, parameter.name
        assert parameter.grad is not None
        assert parameter.grad.dtype == expected
        assert torch.isfinite(parameter.grad).all()


def test_writing_a_bound_tensor_changes_the_model() -> None:
    """Parameters are the given memory: a write through one shows in the other, stacked experts included."""
    config = FAMILIES["qwen3-moe"].config()
    shards = whole_shards(build(config))
    bound = bind_model(config, shards, WHOLE)
    for parameter in bound.parameters:
        shards[parameter.name][1].fill_(0.25)
        assert bool((parameter.tensor == 0.25).all()), parameter.name
    assert all(bool((p == 0.25).all()) for p in bound.module.parameters())
