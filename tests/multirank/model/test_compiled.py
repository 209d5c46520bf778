"""What makes a model fast changes no numbers: joined products, compiled layers, padded attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import map_copy, relative_error, samples, train_gradients
from apollo_tp.model import BoundModel, bind_model
from apollo_tp.model.attention import _one_padded_sequence, _one_sequence
from apollo_tp.model.batch import pack
from apollo_tp.model.compiled import CompileOptions, compile_layers, decoder_layers
from apollo_tp.model.joined import JoinedLinear, JoinedPart, stack_rows
from tests.support.families import CASES
from tests.support.ranks import run_ranks

LENGTHS = ((37, 5, 20), (29, 11))
"""Samples of each step: other lengths and other numbers of sequences than those that were compiled first."""


def _bound(tp: TPGroup, folder: Path, name: str, compiled: CompileOptions | None = None) -> BoundModel:
    case = CASES[name]
    mapped = map_copy(folder / case.checkpoint, tp)
    config = AutoConfig.from_pretrained(folder / case.checkpoint)
    return bind_model(
        config, mapped.tensors, tp, fused_tensors=mapped.fused_tensors,
        gradient_checkpointing=case.gradient_checkpointing, compiled=compiled,
    )  # fmt: skip


def _summed_bytes(tp: TPGroup, run: Callable[[], float]) -> tuple[float, int]:
    """What ``run`` returns, and the bytes that it summed over the ranks."""
    before = tp.traffic["all_reduce"]
    return run(), tp.traffic["all_reduce"] - before


def _check_compiled(tp: TPGroup, folder: Path, name: str, backend: str) -> float:
    """The largest relative error of a loss or a gradient over the steps."""
    plain, fast = _bound(tp, folder, name), _bound(tp, folder, name, CompileOptions(backend=backend))
    for module in (*plain.module.modules(), *fast.module.modules()):
        if isinstance(module, JoinedLinear):
            module.min_part_rows = 16  # of these small models too, the larger parts have products of their own
    worst, residuals = 0.0, 0
    summed_products = tp.summed_products

    def count(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal residuals
        residuals += kwargs.get("residual") is not None
        return summed_products(*args, **kwargs)  # type: ignore[arg-type]

    tp.summed_products = count  # type: ignore[method-assign]
    for seed, lengths in enumerate(LENGTHS):
        batches = pack(samples(seed=seed, lengths=lengths), 80)
        expected, plain_bytes = _summed_bytes(tp, lambda: train_gradients(plain, batches))  # noqa: B023
        got, fast_bytes = _summed_bytes(tp, lambda: train_gradients(fast, batches))  # noqa: B023
        assert fast_bytes == plain_bytes, "compiled code repeats sums over ranks, or leaves some out"
        worst = max(worst, abs(got - expected) / abs(expected))
        for mine, theirs in zip(fast.parameters, plain.parameters, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            worst = max(worst, relative_error(mine.grad, theirs.grad, theirs.grad))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"], dict(counters["graph_break"])
    if backend == "inductor":
        layers = len(decoder_layers(fast.module))
        assert residuals == 2 * layers * len(LENGTHS), "a layer adds two residuals"
    return worst


@pytest.mark.parametrize(
    ("name", "size", "backend"),
    # "aot_eager" traces and cuts graphs like the other, and runs them as they are: no C++ compiler for every length
    [
        ("qwen3", 2, "aot_eager"),
        ("checkpointing", 1, "aot_eager"),
        ("qwen3.5", 2, "aot_eager"),
        ("llama", 2, "inductor"),
    ],
)
def test_compiled_layers_have_the_same_gradients(name: str, size: int, backend: str, checkpoints: Path) -> None:
    """fp32; other fusions round otherwise, and a delta net's exponentials of sums carry that on. One graph a layer:
    collectives and boundaries break none."""
    for worst in run_ranks(_check_compiled, size, checkpoints, name, backend, deadline_seconds=280):
        assert worst < CASES[name].tolerance


def _modules(tp: TPGroup, folder: Path, name: str) -> tuple[int, list[tuple[str, ...]]]:
    bound = _bound(tp, folder, name)
    joined = {n for n, child in bound.module.named_modules() if isinstance(child, JoinedPart)}
    leaves: dict[int, list[str]] = {}
    for parameter in bound.parameters:
        leaves.setdefault(id(parameter.leaf), []).append(parameter.name.rpartition(".")[0].rpartition(".")[2])
    return len(joined), sorted({tuple(names) for names in leaves.values() if len(names) > 1})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_served_side_by_side_is_one_product(size: int, checkpoints: Path) -> None:
    """Query, key and value rows, and gate and up rows, of every layer share a leaf; row-parallel layers do not."""
    for count, leaves in run_ranks(_modules, size, checkpoints, "qwen3"):
        assert leaves == [("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")]
        assert count == 5 * AutoConfig.from_pretrained(checkpoints / CASES["qwen3"].checkpoint).num_hidden_layers


@pytest.mark.parametrize("min_part_rows", [1, 1024])
def test_parts_of_a_joined_product_asked_out_of_turn_are_right(min_part_rows: int) -> None:
    """Another input, another order, a part twice: slower, never another part's numbers or gradients; nothing is kept
    afterwards. With products of the parts in the backward pass, and with one."""
    weight, bias = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(7))
    joined = JoinedLinear(weight, bias, (2, 4, 1), min_part_rows)
    parts = [JoinedPart(joined, i) for i in range(3)]
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    rows = [slice(0, 2), slice(2, 6), slice(6, 7)]
    leaves = (weight, bias, x, y)

    def expected(i: int, value: torch.Tensor) -> torch.Tensor:
        return (value @ weight.T + bias)[:, rows[i]]

    got, plain = torch.zeros(()), torch.zeros(())
    for i, value in [(0, x), (1, x), (2, x), (2, y), (0, x), (0, y), (1, x), (1, x), (2, x)]:
        output = parts[i](value)
        torch.testing.assert_close(output, expected(i, value))
        factors = torch.randn_like(output)
        got, plain = got + (output * factors).sum(), plain + (expected(i, value) * factors).sum()
    assert joined.last_input is None
    assert joined.outputs == ()
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_joined_product_that_raised_is_computed_when_it_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds neither its input nor rows that it does not have."""
    joined = JoinedLinear(nn.Parameter(torch.randn(7, 3)), None, (2, 5))
    x = torch.randn(5, 3)
    with monkeypatch.context() as patched:
        patched.setattr(joined, "_products", lambda x: [].pop())
        with pytest.raises(IndexError):
            joined.part(0, x)
    assert joined.last_input is None
    torch.testing.assert_close(joined.part(0, x), x @ joined.weight[:2].T)


def test_only_neighbours_in_memory_are_stacked() -> None:
    memory = torch.arange(24.0).view(8, 3)
    above, below = memory[:2], memory[2:5]
    stacked = stack_rows([above, below])
    assert stacked is not None
    assert torch.equal(stacked, memory[:5])
    assert stacked.data_ptr() == memory.data_ptr()
    for others in ([below, above], [above, memory[3:5]], [above, below.clone()], [above, below.bfloat16()]):
        assert stack_rows(others) is None


@pytest.mark.parametrize("length", [1, 37, 256, 300])
def test_padding_behind_a_sequence_changes_nothing(length: int) -> None:
    """What the GPU path does to a single sequence, on the CPU's attention: values and gradients."""
    query = torch.randn(1, 4, length, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(2))
    plain = _one_sequence(query[0], key[0], value[0], None, None, None, None).transpose(0, 1)[None]
    padded = _one_padded_sequence(query, key, value, None)
    torch.testing.assert_close(padded, plain)
    upstream = torch.randn_like(plain)
    for mine, theirs in zip(
        torch.autograd.grad(padded, (query, key, value), upstream),
        torch.autograd.grad(plain, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def _layers_compiled(tp: TPGroup, folder: Path) -> int:
    return compile_layers(_bound(tp, folder, "olmo2").module, CompileOptions())


def test_a_model_with_routed_experts_is_not_compiled() -> None:
    """Nor its dense layers, whose rounding on each rank the routers behind them would follow."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "num_experts": 4}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, mlp_only_layers=[0]))
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock"]
    assert compile_layers(model, CompileOptions()) == 0


def test_layers_with_independent_collectives_are_not_compiled(checkpoints: Path) -> None:
    """Two norms over the heads of all ranks do not depend on each other: each rank could order them as it likes."""
    assert run_ranks(_layers_compiled, 2, checkpoints) == [0, 0]
