"""FP8 casts and products against their definition, in one process; which layers take part; numbers that are not finite."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import fp8, fp8_linear
from apollo_tp.model.fp8_layers import Fp8Linear
from apollo_tp.model.joined import JoinedLinear
from apollo_tp.model.sum_passes import JoinResiduals, OrderSums
from apollo_tp.optim import Optimizer
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample
from tests.support.fp8_twin import bound, dequantised, twin

ALONE = TPGroup.single()
BF16 = 2.0**-8
"""The largest relative error of rounding to bf16, which is what FP8 products and their twin differ by."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(params=[True, False], ids=["rows", "tensor"])
def per_row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of scales."""
    monkeypatch.setattr(fp8, "PER_ROW", request.param)
    return bool(request.param)


def _operands(tokens: int, rows: int = 48, columns: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight, and gradient of the product; rows of very different size, and one that is 0."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(tokens, columns), torch.randn(rows, columns) * 0.02, torch.randn(tokens, rows) * 1e-6
    x[0], grad[-1] = 0, 0
    x[1:] *= torch.logspace(-3, 3, tokens - 1)[:, None]
    return x.bfloat16(), weight.bfloat16(), grad.bfloat16()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.usefixtures("per_row")
def test_products_and_gradients_are_those_of_dequantised_values(
    kind: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a number of tokens that is no multiple of 16, whose gradients come in parts that are none either."""
    monkeypatch.setattr(fp8_linear, "KEEP_COLUMN_INPUTS", keep)
    monkeypatch.setattr(fp8_linear, "KEEP_ROW_INPUTS", keep)
    x, weight, grad = _operands(21)
    x.requires_grad_()
    weight.requires_grad_()
    if kind == "column":
        parts = fp8_linear.column_parallel_fp8_linear(x[None], weight, None, (20, 28), ALONE)
        assert [part.shape for part in parts] == [(1, 21, 20), (1, 21, 28)]
        out = torch.cat(parts, -1)[0]
    else:
        out = fp8_linear.row_parallel_fp8_linear(x, weight, ALONE)
    out.backward(grad)
    for got, expected in zip((out, x.grad, weight.grad), twin(x, weight, grad), strict=True):
        assert got is not None
        torch.testing.assert_close(got.float(), expected, rtol=BF16, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.usefixtures("per_row")
def test_what_is_not_finite_stays_so(value: float) -> None:
    """In the rows of the product that it belongs to and in the gradients, although the casts saturate."""
    for position in range(3):
        operands = _operands(21)
        operands[position][3, 5] = value
        x, weight, grad = operands
        x.requires_grad_()
        weight.requires_grad_()
        (out,) = fp8_linear.column_parallel_fp8_linear(x, weight, None, (48,), ALONE)
        out.backward(grad)
        assert x.grad is not None
        assert weight.grad is not None
        spoiled = {0: (out[3], weight.grad), 1: (out[:, 3], x.grad), 2: (x.grad[3], weight.grad)}
        assert not any(tensor.isfinite().any() for tensor in spoiled[position])


def test_a_step_with_an_infinite_activation_is_skipped() -> None:
    """As in bf16: nothing is written."""
    model = bound(ALONE)
    config = OptimConfig(rank=4, lr=1e-3, check_replicas_every=0, max_relative_update=1.0)
    optimizer = Optimizer(config, Precision.stochastic, model.parameters, ALONE)
    trainer = Trainer(model, optimizer, ALONE, device=torch.device("cpu"), max_micro_batch_tokens=64)
    sample = Sample(list(range(40)), [0.0] + [1.0] * 39)
    assert not trainer.step([sample]).skipped
    weights = {p.name: p.tensor.clone() for p in model.parameters}
    weights["model.layers.1.input_layernorm.weight"][7] = math.inf
    for p in model.parameters:
        p.tensor.copy_(weights[p.name])
    assert "finite" in str(trainer.step([sample]).skipped)
    assert all(torch.equal(p.tensor, weights[p.name]) for p in model.parameters)


def test_what_does_not_fit_keeps_its_products(caplog: pytest.LogCaptureFixture) -> None:
    """Logged once for each reason; the rest is in FP8. Head and embedding never are."""
    with caplog.at_level(logging.INFO, "apollo_tp.model.fp8_layers"):
        model = bound(ALONE, intermediate_size=200)
    modules = dict(model.module.named_modules())
    assert isinstance(modules["model.layers.0.self_attn.o_proj"], Fp8Linear)
    joined = {name: module.is_fp8 for name, module in modules.items() if isinstance(module, JoinedLinear)}
    assert joined == {
        f"model.layers.{layer}.{name}.joined": fits
        for layer in (0, 1)
        for name, fits in (("self_attn.q_proj", True), ("mlp.gate_proj", True))
    }
    assert type(modules["model.layers.1.mlp.down_proj"]) is torch.nn.Linear
    assert type(modules["lm_head"]) is torch.nn.Linear
    about = [record.getMessage() for record in caplog.records]
    assert sum("64 x 200 on this rank, expected multiples of 16" in message for message in about) == 1
    assert "6 linear layers" in about[-1]


@pytest.mark.parametrize("values", [fp8.VALUES, fp8.GRADIENTS])
def test_scales_are_the_powers_of_two_that_bring_values_below_the_largest(values: torch.dtype) -> None:
    largest = torch.finfo(values).max
    exact = torch.tensor([largest, largest * (1 + 2**-7), largest / 2, 3e38, 1e-20, 0.0])
    scale, inverse = fp8.scales(exact, values)
    assert scale.tolist()[:3] == [1.0, 0.5, 2.0]
    assert torch.equal(scale * inverse, torch.ones(6))
    assert bool(((exact[:5] * scale[:5] > largest / 2) & (exact[:5] * scale[:5] <= largest)).all())


def test_a_residual_is_added_by_the_operator_that_sums() -> None:
    """In traced code, with the same bits, also where the product is a matrix and the residual is not."""
    x, weight, _ = _operands(21)
    operands = fp8_linear._enter(_Context(), x, weight, False)
    residual = torch.randn(1, 21, 48).bfloat16()
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "weight", "x_inverse", "weight_inverse", "residual")]
    product = graph.call_function(fp8_linear.row_parallel_fp8, (*inputs[:4], ALONE.number))
    viewed = graph.call_function(torch.ops.aten.view.default, (product, list(residual.shape)))
    viewed.meta["val"] = inputs[4].meta["val"] = residual
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (inputs[4], viewed)))
    expected = fx.GraphModule(torch.nn.Module(), graph)(*operands, residual)
    JoinResiduals()(graph)
    OrderSums()(graph)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [fp8_linear.row_parallel_add_fp8]
    assert torch.equal(fx.GraphModule(torch.nn.Module(), graph)(*operands, residual), expected)


class _Context:
    """Of an autograd function, where nothing is saved."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="the test below runs in this process")
def test_casts_in_the_interpreter() -> None:
    """The test below passes in Triton's interpreter, which is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "kernels", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


@needs_triton
@pytest.mark.skipif(not HERE, reason="run by test_casts_in_the_interpreter")
@pytest.mark.parametrize("values", [fp8.VALUES, fp8.GRADIENTS])
def test_kernels_have_the_bits_of_the_casts_by_torch(values: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, every layout and kind of scales, of a matrix of no whole tiles that is a view of wider rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(fp8, "TILE", (32, 32))
    if DEVICE == "cuda":
        x = torch.randn(37, 90) * torch.logspace(-4, 4, 37)[:, None]
    else:  # the interpreter rounds to FP8 in its own way: values that need no rounding
        x = (
            torch.randint(4, 8, (37, 90))
            * 2.0 ** torch.randint(-3, 3, (37, 90))
            * 2.0 ** (torch.arange(37) % 5)[:, None]
        )
        x *= torch.randint(0, 2, (37, 90)) * 2 - 1
    x = x.bfloat16().to(DEVICE)[:, 3:83]
    x[5, 7], x[6, 1], x[9] = math.inf, math.nan, 0
    per_row = fp8.scales(fp8.largest_of_rows([x[7:]]), values).scale
    one = fp8.scales(x[7:].float().abs().amax(), values).scale
    got: dict[bool, list[Tensor]] = {}
    for fused in (True, False):
        monkeypatch.setattr(fp8, "FUSED_CAST", fused)
        if DEVICE == "cpu":  # where the kernels are not chosen by themselves
            monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _, fused=fused: fused))
        found: list[Tensor] = []
        for max_block in (16384, 32):
            monkeypatch.setattr(fp8, "MAX_BLOCK", max_block)
            rows, inverse, largest = fp8.fp8_cast_rows(x, values)
            found += [rows[7:], inverse, largest.nan_to_num(-1.0)]
        for row_scales, layouts in (
            (per_row, (True, True)),
            (one, (True, True)),
            (one, (False, True)),
            (one, (True, False)),
        ):
            found += fp8.fp8_cast([x[7:, :20], x[7:, 20:]], row_scales, one, values, *layouts)
        got[fused] = found
    monkeypatch.undo()
    for mine, theirs in zip(got[True], got[False], strict=True):
        assert mine.dtype == theirs.dtype
        as_bytes = (mine, theirs) if mine.dtype is torch.float32 else (mine.view(torch.uint8), theirs.view(torch.uint8))
        torch.testing.assert_close(*as_bytes, rtol=0, atol=0, equal_nan=True)
    expected = dequantised(x[7:].float(), values, 1)
    assert torch.equal(got[True][0].float() * got[True][1][7:, None], expected)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="in a process without the interpreter")
def test_the_casts_compile_for_a_gpu() -> None:
    """To machine code of compute capability 9.0, which needs none: the interpreter takes more than the compiler does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from apollo_tp.model.fp8_kernels import cast_kernel, cast_rows_kernel

    tile = {"BLOCK_M": fp8.TILE[0], "BLOCK_K": fp8.TILE[1], "LIMIT": 448.0}
    row = {"LIMIT": 448.0, "TOP": 8, "MAX_SHIFT": fp8.MAX_SHIFT}
    fp32 = {"inverse": "*fp32", "largest": "*fp32", "row_scales": "*fp32", "scale": "*fp32"}
    pointers = {"x": "*bf16", "out": "*fp8e4nv", "transposed": "*fp8e5", **fp32}
    for kernel, constants in (
        (cast_kernel, tile | {"PER_ROW": 1, "ROWS": True, "COLUMNS": True}),
        (cast_rows_kernel, row | {"WHOLE": True, "BLOCK": 4096}),
        (cast_rows_kernel, row | {"WHOLE": False, "BLOCK": fp8.MAX_BLOCK}),
    ):
        names = [parameter.name for parameter in kernel.params]
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        assert "cubin" in compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm
