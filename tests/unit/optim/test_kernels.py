"""The Triton kernels against their plain torch twin: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from apollo_tp.config import OptimizerKind, Precision, Projection
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim import Optimizer, OptimParameter, rounding
from apollo_tp.optim.rounding import join
from apollo_tp.optim.sharding import Decision, DecisionInputs, GradientStats
from apollo_tp.optim.torch_backend import TorchBackend, decide
from apollo_tp.shards.boxes import Shard
from tests.support import optim_model as model
from tests.support.special_values import NOT_FINITE, from_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter is chosen when triton is first imported, so it needs a process of its own.
HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.skipif(HERE, reason="the tests below run in this process")
def test_in_the_interpreter():
    """All tests below pass in Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(HERE, reason="in a process without the interpreter")
@pytest.mark.parametrize("bits", [8, 16])
def test_the_kernel_with_remainders_compiles_for_a_gpu(bits):
    """To machine code of compute capability 9.0, which needs none: the interpreter takes more than the compiler does."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from apollo_tp.optim.kernels import write_kernel
    from apollo_tp.optim.triton_backend import WRITE_TILE

    rows, columns = WRITE_TILE[True]
    constants = {
        "CHANNELS_LAST": False, "EVEN": True, "REMAINDER": bits, "STOCHASTIC": False, "W_TYPE": tl.bfloat16,
        "G_TYPE": tl.bfloat16, "BLOCK_R": rows, "BLOCK_N": columns,
    }  # fmt: skip
    pointers = {"table": "*i64", "addresses": "*i64", "scales": "*fp32", "coefficients": "*fp32", "decay": "fp32"}
    names = [parameter.name for parameter in write_kernel.params]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "*i32") for name in names}
    source = ASTSource(write_kernel, signature=signature, constexprs=constants)
    assert "cubin" in compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm


def triton_backend(group):
    """The kernels, on whatever device the optimizer is."""
    from apollo_tp.optim import triton_backend as module

    for name, tile in TILES.items():
        setattr(module, name, tile)
    return module.TritonBackend(group.groups, group.adamw, group.config, group.weights)


# Small tiles, so that some of optim_model's shapes divide by them (the even path) and some do not (the masked path), and
# the interpreter has few of them. A GPU tests the real ones.
TILES = {"PROJECT_TILE": (32, 32), "WRITE_TILE": dict.fromkeys((False, True), (32, 32))} if DEVICE == "cpu" else {}
EVEN_SPECS = (
    (model.Spec("even_adamw.weight", (32, 64), 0, "other"),)
    if DEVICE == "cpu"
    else (
        model.Spec("even_right.weight", (512, 512), 0),
        model.Spec("even_left.weight", (512, 1024), 1),
        model.Spec("even_adamw.weight", (16, 512), 0, "other"),
    )
)


# like others that stay; the interpreter takes a second for each tensor
SLOW = {"square_row.weight", "square_column.weight", "in_proj_qkv.weight", "k_tall.weight", "router.weight", "a_log"}


class TwoRanksInOne(TPGroup):
    """Rank 0 of two whose partner sends the very same numbers: exercises the exchanged layout in one process."""

    def all_reduce_(self, tensor, op=None):
        return tensor.mul_(2)

    def reduce_scatter(self, tensor):
        return tensor[:1] * 2

    def all_gather(self, tensor):
        return torch.cat([tensor, tensor])


def run(backend: str, size: int, precision: Precision, dtype: torch.dtype, **changes) -> tuple[list, dict, dict, dict]:
    """Outcomes, weights and state after two steps, and the sum of the weights' magnitudes after each."""
    tp = TPGroup.single() if size == 1 else TwoRanksInOne(0, 2)
    generator = torch.Generator().manual_seed(3)
    few = [s for s in model.SPECS if DEVICE == "cuda" or s.name not in SLOW]
    specs, params, whole = (*few, *EVEN_SPECS), [], model.weights()
    for spec in specs:
        shard = spec.shard(0, size)
        value = whole[spec.name] if spec.name in whole else torch.randn(spec.shape, generator=generator) * 0.02
        tensor = torch.nn.Parameter(model.part(value, shard).to(dtype).to(DEVICE))
        params.append(OptimParameter(shard, tensor, spec.role))
    config = model.config(check_replicas_every=0, max_relative_update=100.0, **changes)
    optimizer = Optimizer(config, precision, params, tp)
    group = optimizer.update_group
    group.backend = TorchBackend(group.groups, group.adamw, config)
    if backend == "triton":
        group.backend = triton_backend(group)
    outcomes, magnitudes = [], {p.name: torch.zeros(p.shard.local_shape) for p in params}
    for step in range(2):
        grads = model.gradients(step)
        for p, spec in zip(params, specs, strict=True):
            g = grads[p.name] if p.name in grads else torch.randn(spec.shape, generator=generator) * 1e-3
            p.tensor.grad = model.part(g, p.shard).to(dtype).to(DEVICE)
        if step == 1:
            params[0].tensor.grad = torch.zeros_like(params[0].tensor)
            params[-1].tensor.grad = None
        outcomes.append(optimizer.step())
        for p in params:
            magnitudes[p.name] += p.tensor.detach().float().abs().cpu()
        if step == 1:
            params[2].tensor.grad[0, 0] = float("nan")
            assert "case_c.weight on rank 0" in optimizer.step().skipped
    weights = {p.name: p.tensor.detach().float().cpu() for p in params}
    for w in optimizer.weights:
        if w.remainder is not None:
            weights[w.name] = join(w.data, w.remainder).view(w.shard.local_shape).cpu()
    state = {f"m{i}": g.exp_avg.cpu() for i, g in enumerate(group.groups)}
    state |= {f"v{i}": g.exp_avg_sq.cpu() for i, g in enumerate(group.groups)}
    state |= {a.weight.name: a.exp_avg_sq.cpu() for a in group.adamw.values()}
    return outcomes, weights, state, magnitudes


CASES = {
    "remainder": (2, Precision.remainder, torch.bfloat16, {"max_grad_norm": 0.05}),
    "remainder16": (2, Precision.remainder16, torch.bfloat16, {"max_grad_norm": 0.05}),
    "stochastic": (2, Precision.stochastic, torch.bfloat16, {}),
    "nearest_rank_40": (1, Precision.nearest, torch.bfloat16, {"max_grad_norm": None, "rank": 40}),
    "float32_gaussian": (2, Precision.remainder, torch.float32, {"rank": 20, "projection": Projection.gaussian}),
    "mini": (2, Precision.remainder, torch.bfloat16, {"kind": OptimizerKind.apollo_mini}),
    "adamw": (1, Precision.stochastic, torch.bfloat16, {"kind": OptimizerKind.adamw}),
}


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("name", list(CASES))
def test_kernels_equal_their_twin(name):
    """Weights, moments and outcomes are the twin's, in every precision, sharding case and tile path.

    Sums run in another order, so values agree to fp32 rounding; a bf16 weight may then round to its other neighbour,
    stochastically or to nearest, in few places.
    """
    size, precision, dtype, changes = CASES[name]
    outcomes, weights, state, _ = run("triton", size, precision, dtype, **changes)
    expected_outcomes, expected, expected_state, magnitudes = run("torch", size, precision, dtype, **changes)
    for mine, theirs in zip(outcomes, expected_outcomes, strict=True):
        assert mine.num_updated == theirs.num_updated
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert mine.largest_update == pytest.approx(theirs.largest_update, rel=1e-4)
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=float(value.abs().max()) * 1e-5)
    whole_bits = precision in (Precision.stochastic, Precision.nearest) and dtype is torch.bfloat16
    for key, value in expected.items():
        error = (weights[key] - value).abs()
        if whole_bits:
            assert float((error > 0).float().mean()) < 0.01, key
            # a step's neighbour is 2**-8 to 2**-7 away; the first step's stays when the second brings the weight near zero,
            # and so does the fp32 rounding of terms of about 0.1
            excess = float((error - magnitudes[key] * 2.0**-7).max())
            assert excess <= 1e-8, f"{key}: excess {excess}"
        else:  # 24 or 32 bits: the last of 16 of the significand; fp32: rounding
            assert bool((error <= value.abs() * 2.0**-14 + 1e-6).all()), key


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
def test_the_random_bits_of_the_kernel_are_those_of_the_twin():
    """With no update, stochastic writing keeps every bf16 value; with a known one, kernel and twin agree bit for bit."""
    shard = Shard("w", (16, 1024), None, (), (0,))
    ends = []
    for make in ("torch", "triton"):
        weight = torch.nn.Parameter(torch.full((16, 1024), 1.0, dtype=torch.bfloat16, device=DEVICE))
        config = model.config(
            kind=OptimizerKind.adamw, lr=1e-3, weight_decay=0.0, max_grad_norm=None, check_replicas_every=0
        )
        optimizer = Optimizer(config, Precision.stochastic, [OptimParameter(shard, weight, "matrix")], TPGroup.single())
        group = optimizer.update_group
        group.backend = TorchBackend(group.groups, group.adamw, config)
        if make == "triton":
            group.backend = triton_backend(group)
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            assert optimizer.step().num_updated == 1
        ends.append(weight.detach().float().cpu())
    assert torch.equal(ends[0], ends[1])
    share = float((ends[0] < 1.0).float().mean())
    assert 0.2 < share < 0.8  # 1e-3 is a quarter of the ulp below 1.0, twice


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_parameter_whose_pieces_differ_in_kernel_is_summed_whole(value):
    """A fused bias of which this rank holds 32 rows, which tiles divide, and twice 8, which they do not."""
    shard = Shard("qkv.bias", (96,), 0, ((0, 32), (64, 72), (80, 88)), (0,))
    ends = []
    for make in ("torch", "triton"):
        bias = torch.nn.Parameter(torch.ones(48, device=DEVICE))
        config = model.config(check_replicas_every=0, max_relative_update=100.0, max_grad_norm=None)
        optimizer = Optimizer(config, Precision.nearest, [OptimParameter(shard, bias, "other")], TPGroup.single())
        group = optimizer.update_group
        group.backend = TorchBackend(group.groups, group.adamw, config)
        if make == "triton":
            group.backend = triton_backend(group)
        bias.grad = torch.full_like(bias, 0.5)
        bias.grad[3] = value
        outcome = optimizer.step()
        ends.append((outcome.grad_norm, outcome.largest_update, outcome.skipped))
    (norm, update, skipped), (expected_norm, expected_update, expected_skipped) = reversed(ends)
    assert norm == pytest.approx(expected_norm, rel=1e-6, nan_ok=True)
    assert update == pytest.approx(expected_update, rel=1e-6)
    assert skipped == expected_skipped
    assert ("qkv.bias on rank 0" in skipped) == math.isnan(value)


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("how", ["remainder", "remainder16", "stochastic", "nearest"])
def test_numbers_at_the_edges_are_stored_as_by_the_twin(how):
    """Bit for bit: NaNs of all payloads, which stay NaNs; infinities, largest numbers, ties, zeros and subnormal ones."""
    from tests.support.store_kernel import stored

    edges = [0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0, 1, 0x00008000, 0x3F808000, 0x3F818000, 0x3F80FF80, 0x3F7FFFFF]
    value = from_bits([*NOT_FINITE, *edges, *(1 << 31 | bits for bits in edges)]).to(DEVICE)
    for bits in (0, 0x8000, 0xFFFF):
        random = torch.full((len(value),), bits, dtype=torch.int32, device=DEVICE)
        weight = torch.zeros_like(value, dtype=torch.bfloat16)
        rest = torch.zeros_like(value, dtype=torch.int16 if how == "remainder16" else torch.int8)
        rounding.store(
            weight, rest if how.startswith("remainder") else None, value, random if how == "stochastic" else None
        )
        got, got_rest = stored(value, random, how)
        nan = weight.isnan()
        assert torch.equal(nan, value.isnan())
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got.view(torch.int16)[~nan], weight.view(torch.int16)[~nan])
        assert torch.equal(got_rest, rest)


LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "columns of a wider tensor": lambda g: torch.cat([g, g], dim=1)[:, : g.shape[1]],
    "every second column": lambda g: g.repeat_interleave(2, dim=1)[:, ::2],
    # a power of two: signed sums of another number cancel to rounding errors, which depend on the order of additions
    "one number": lambda g: torch.full_like(g[:1, :1], 0.5).expand(g.shape),
}


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_weights_are_read_where_they_lie(layout):
    """A gradient of any layout, and weights that are columns of a wider tensor, whose neighbours keep their bits."""
    shapes, generator = {"left": (12, 40), "right": (40, 12), "adamw": (4, 24)}, torch.Generator().manual_seed(5)
    values, grads = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
    ends = []
    for make in ("torch", "triton"):
        params, wholes = [], []
        for name, shape in shapes.items():
            whole = torch.full((shape[0], shape[1] + 16), 7.0, device=DEVICE)
            whole[:, 3 : 3 + shape[1]] = values[name]
            tensor = torch.nn.Parameter(whole[:, 3 : 3 + shape[1]])
            tensor.grad = LAYOUTS[layout](grads[name].to(DEVICE))
            assert tensor.grad.stride() != tuple(torch.empty(shape).stride())
            params.append(OptimParameter(Shard(name, shape, None, (), (0,)), tensor, "matrix"))
            wholes.append(whole)
        config = model.config(check_replicas_every=0, max_relative_update=100.0, max_grad_norm=None)
        optimizer = Optimizer(config, Precision.nearest, params, TPGroup.single())
        group = optimizer.update_group
        assert (len(group.matrices), len(group.adamw)) == (2, 1)
        group.backend = TorchBackend(group.groups, group.adamw, config)
        if make == "triton":
            group.backend = triton_backend(group)
        assert optimizer.step().num_updated == 3
        ends.append(wholes)
    for got, expected in zip(*reversed(ends), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        assert bool((got[:, :3] == 7).all())
        assert bool((got[:, -13:] == 7).all())


BLOCK = 1024
CANARIES = {"canary 1": (0, 1.0), "canary NaN": (3, math.nan), "canary 0": (-1, 0.0), "canary large": (-1, 1e30)}
"""A sum in which one rank took part alone, and what lies in memory: (which canary, its value)."""


def decision_inputs(count: int, kind: OptimizerKind, spoil: str) -> tuple[GradientStats, DecisionInputs]:
    """Plausible numbers of ``count`` parameters out of 2 ``count``, with one thing wrong."""
    generator = torch.Generator().manual_seed(count)
    indices = torch.randperm(2 * count, generator=generator)[:count]

    def positive(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    inputs = DecisionInputs(
        projected=torch.randint(0, 3, (count,), generator=generator, dtype=torch.int32),
        root_scales=positive(count),
        indices=indices,
        limiter_norms=positive(2 * count),
        weight_norms=positive(2 * count) * 100,
        corrections=positive(count),
        steps=torch.randint(0, 3, (count,), generator=generator, dtype=torch.int32),
        learning_rate=torch.tensor(0.01, dtype=torch.float64),
        expected_checks=torch.tensor([2.0, 2.0, *[4.0] * BLOCK]),  # of two ranks; more than the kernel takes at a time
    )
    squares, norms = positive(count + 1).float(), positive(count, 2).float()
    squares[count], squares[count // 3] = 0, 0  # no loss is bad; one parameter without a gradient
    alive = torch.tensor([1.0 if spoil == "not alive" else 2.0])
    checks = inputs.expected_checks.clone()
    if spoil in CANARIES:
        position, value = CANARIES[spoil]
        checks[position] = value
    if spoil == "loss":
        squares[count] = torch.nan
    elif spoil == "gradient":
        squares[count - 1] = torch.inf
    elif spoil == "norm":
        norms[count - 1, int(kind is OptimizerKind.apollo_mini)] = torch.nan
    elif spoil == "too long":
        inputs.weight_norms[indices[count - 1]] = 1e-3
    return GradientStats(squares, squares, norms, torch.tensor(0.7), alive, checks), inputs


SPOILED = ["nothing", "not alive", "loss", "gradient", "norm", "too long", *CANARIES]


def decided(form: Callable, count: int, kind: OptimizerKind, spoil: str) -> tuple[Decision, torch.Tensor]:
    """A decision, and the limiter's norms after it."""
    stats, inputs = decision_inputs(count, kind, spoil)
    stats, inputs = (type(x)(*(t.to(DEVICE) for t in vars(x).values())) for x in (stats, inputs))
    return form(stats, inputs), inputs.limiter_norms


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("kind", [OptimizerKind.apollo, OptimizerKind.apollo_mini])
def test_the_decision_on_the_device_equals_its_twin(kind, spoil):
    """What is written, reported and remembered, for more parameters than the kernel takes at a time; fp64 throughout."""
    from apollo_tp.optim import decide_kernel

    assert decide_kernel.BLOCK == BLOCK
    for growth in (1.01, None):
        config = model.config(kind=kind, norm_growth_limit=growth, max_relative_update=0.1)
        on_device = decide_kernel.DecideOnDevice(config, torch.device(DEVICE))
        expected, limiter = decided(partial(decide, config=config), BLOCK + 300, kind, spoil)
        got, moved = decided(on_device, BLOCK + 300, kind, spoil)
        assert torch.equal(got.write, expected.write), growth
        assert torch.equal(got.good, expected.good), growth
        assert int(got.good) == (spoil in {"nothing", "not alive"})
        assert int(got.write.sum()) == (BLOCK + 299) * (spoil == "nothing")
        assert bool(got.report[0]) == (spoil not in CANARIES)
        torch.testing.assert_close(got.report, expected.report, rtol=1e-12, atol=0.0, equal_nan=True)
        torch.testing.assert_close(moved, limiter, rtol=1e-12, atol=0.0)
        if spoil == "nothing":
            torch.testing.assert_close(got.coefficients, expected.coefficients, rtol=2e-7, atol=0.0)


@pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter")
@pytest.mark.parametrize(
    ("shape", "first"), [((3, 5), 0), ((64, 128), 0), ((5, 4096), 3), ((300, 48), 256), ((2, 4096), 2)]
)
def test_a_sum_over_two_ranks_is_rounded_as_torch_does(shape, first):
    """Bit for bit on a GPU. The interpreter cuts bf16 off where it should round: up to one unit in the last place, twice."""
    from apollo_tp.distributed.peer_kernels import add

    for dtype in (torch.bfloat16, torch.float32):
        mine, theirs, residual = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
        far = theirs.clone()
        far[:first] = torch.nan  # these come from the other tensor
        for expected, got in (
            (mine + theirs, add(mine, theirs[:first], far, None)),
            ((mine + theirs) + residual, add(mine, theirs[:first], far, residual)),
        ):
            cut_off = 2**-7 * ((mine + theirs).abs() + expected.abs())
            tolerance = cut_off if DEVICE == "cpu" and dtype is torch.bfloat16 else 0
            assert ((got - expected).abs() <= tolerance).all()
