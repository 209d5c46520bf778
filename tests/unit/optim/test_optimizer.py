"""Variants and options of the optimizer on one rank."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from apollo_tp.config import EmbeddingMode, OptimConfig, OptimizerKind, Precision, Schedule
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, UnsupportedModelError
from apollo_tp.optim import Optimizer, OptimParameter, rounding
from apollo_tp.optim.optimizer import learning_rate
from apollo_tp.shards.boxes import Shard
from tests.support import optim_model as model

CONF = Path(__file__).parents[3] / "conf" / "optim"


def build(config: OptimConfig, precision: Precision = Precision.remainder, dtype: torch.dtype = torch.float32):
    params = model.parameters(TPGroup.single(), dtype)
    return params, Optimizer(config, precision, params, TPGroup.single())


def test_adamw_is_torch_adamw():
    """optim=adamw gives torch.optim.AdamW's trajectory (decay on matrices only, gradients not clipped)."""
    config = OptimConfig(kind=OptimizerKind.adamw, lr=1e-3, weight_decay=0.1, max_grad_norm=None)
    params, optimizer = build(config)
    copies = {p.name: p.tensor.detach().clone().requires_grad_() for p in params}
    groups = [
        {"params": [t for t in copies.values() if t.ndim > 1], "weight_decay": 0.1},
        {"params": [t for t in copies.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(10):
        model.set_gradients(params, model.gradients(step))
        for p in params:
            copies[p.name].grad = p.tensor.grad.clone()
        optimizer.step()
        theirs.step()
    for p in params:
        # both in fp32 with the operations in another order
        torch.testing.assert_close(p.tensor, copies[p.name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["apollo", "apollo_mini", "adamw"])
def test_option_files_fit_the_schema(kind):
    """conf/optim/<kind>.yaml is a valid OptimConfig of that kind."""
    merged = OmegaConf.merge(OmegaConf.structured(OptimConfig), OmegaConf.load(CONF / f"{kind}.yaml"))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, OptimConfig)
    assert config.kind.value == kind
    assert isinstance(config.betas, (list, tuple))


@pytest.mark.parametrize("mode", list(EmbeddingMode))
def test_embeddings(mode):
    """project: (vocabulary, rank) moments; adamw: full ones; frozen: no state, and no step changes them."""
    params, optimizer = build(model.config(embeddings=mode))
    embedding = next(p for p in params if p.role == "embedding")
    before = embedding.tensor.detach().clone()
    model.set_gradients(params, model.gradients(0))
    optimizer.step()
    assert torch.equal(before, embedding.tensor.detach()) == (mode is EmbeddingMode.frozen)
    assert (embedding.name in optimizer.names) == (mode is not EmbeddingMode.frozen)
    assert (embedding.name in {m.weight.name for m in optimizer.update_group.matrices.values()}) == (
        mode is EmbeddingMode.project
    )


@pytest.mark.parametrize(
    ("precision", "rest"), [(Precision.remainder, 1), (Precision.remainder16, 2), (Precision.stochastic, 0)]
)
def test_state_bytes_follow_the_formula(precision, rest):
    """2 x 4 bytes x rank x channels per matrix, 2 x 4 per AdamW element, 1 or 2 per bf16 element with remainders."""
    config = model.config()
    _, optimizer = build(config, precision, torch.bfloat16)
    expected = 0
    for spec in model.SPECS:
        projected = spec.role != "other" and min(spec.shape) > config.rank
        numel = torch.Size(spec.shape).numel()
        expected += 8 * (config.rank * max(spec.shape) if projected else numel) + rest * numel
    assert optimizer.state_bytes() == expected


@pytest.mark.parametrize("lr", [1e-3, 1e-7])
def test_a_remainder_of_16_bits_is_an_fp32_run(lr):
    """bf16 weights with int16 remainders take the very bits of fp32 weights on the same gradients, at any learning rate; an
    int8 loses what a step changes below its last bit."""
    ends = {}
    for precision, dtype in (
        (Precision.nearest, torch.float32), (Precision.remainder16, torch.bfloat16), (Precision.remainder, torch.bfloat16)
    ):  # fmt: skip
        params, optimizer = build(model.config(lr=lr), precision, dtype)
        for p in params:
            p.tensor.data.copy_(model.weights()[p.name].bfloat16())
        optimizer.rejoin()  # norms of the weights that are there now
        for step in range(6):  # one refresh
            for p in params:
                p.tensor.grad = model.gradients(step)[p.name].bfloat16().to(dtype)
            assert optimizer.step().skipped == ""
        ends[precision] = {w.name: rounding.join(w.data, w.remainder) for w in optimizer.weights}
    for name, exact in ends[Precision.nearest].items():
        assert torch.equal(ends[Precision.remainder16][name], exact), name
    start = {name: w.bfloat16().float() for name, w in model.weights().items()}
    moved = sum(float((w.view_as(start[n]) - start[n]).square().sum()) for n, w in ends[Precision.nearest].items())
    lost = sum(float((w - ends[Precision.nearest][n]).square().sum()) for n, w in ends[Precision.remainder].items())
    assert (lost > 0.2 * moved) == (lr == 1e-7)


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_every_kind_descends(kind):
    """Twenty steps on a least-squares problem with bf16 weights more than halve the loss."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(32, 48, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(32, 48).normal_(generator=generator).bfloat16())
    parameter = OptimParameter(Shard("w", (32, 48), None, (), (0,)), weight, "matrix")
    config = OptimConfig(kind=kind, rank=4, lr=0.05, max_relative_update=1.0, max_grad_norm=None)
    optimizer = Optimizer(config, Precision.remainder, [parameter], TPGroup.single())
    losses = []
    for _ in range(20):
        loss = (weight.float() - target).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_schedules():
    """Warm-up rises to lr; cosine ends at a tenth, linear at zero, both hold after total_steps; constant holds."""
    options = {"lr": 1.0, "warmup_steps": 4, "total_steps": 14}
    for schedule, end in ((Schedule.cosine, 0.1), (Schedule.linear, 0.0), (Schedule.constant, 1.0)):
        config = OptimConfig(schedule=schedule, **options)
        rates = [learning_rate(config, step) for step in range(20)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == pytest.approx(1.0)
        assert rates[14:] == pytest.approx([end] * 6)
        assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
@pytest.mark.parametrize("total", [None, 9, 10])
def test_a_schedule_needs_steps_after_its_warm_up(schedule, total):
    """Else every step after the warm-up would have the end value, 0 with linear."""
    with pytest.raises(ConfigError, match=rf"optim\.total_steps: got {total}, .*more than optim\.warmup_steps \(10\)"):
        OptimConfig(schedule=schedule, warmup_steps=10, total_steps=total)
    OptimConfig(schedule=schedule, warmup_steps=10, total_steps=11)
    OptimConfig(warmup_steps=10)


LAYOUTS = {  # how a server might hold a (96, 64) weight, and whether it can be written in place
    "contiguous": (lambda: torch.zeros(96, 64), True),
    "columns of a wider tensor": (lambda: torch.zeros(96, 100)[:, 20:84], True),
    "rows of a taller tensor": (lambda: torch.zeros(200, 64)[7:103], True),
    "every second row": (lambda: torch.zeros(192, 64)[::2], True),
    "transposed": (lambda: torch.zeros(64, 96).t(), True),
    "every second column": (lambda: torch.zeros(96, 128)[:, ::2], False),
    "one row for all": (lambda: torch.zeros(1, 64).expand(96, 64), False),
    "overlapping rows": (lambda: torch.zeros(8000).as_strided((96, 64), (32, 1)), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_whose_rows_are_not_contiguous_are_refused(name):
    """The kernels take neighbours in a row for neighbours in memory, and each row for its own memory."""
    make, fits = LAYOUTS[name]
    parameter = OptimParameter(Shard("w", (96, 64), None, (), (0,)), torch.nn.Parameter(make()), "matrix")
    if fits:
        Optimizer(model.config(), Precision.remainder, [parameter], TPGroup.single())
        return
    with pytest.raises(UnsupportedModelError, match=r"w: got weights of shape \(96, 64\) with strides .*last stride 1"):
        Optimizer(model.config(), Precision.remainder, [parameter], TPGroup.single())


@pytest.mark.parametrize("shape", [(3, 24, 40), (24, 40)])
@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.apollo])
def test_a_weight_that_is_served_transposed_is_trained_in_its_own_memory(kind, shape):
    """As vLLM has gpt-oss's experts: exactly as the same weight that is given in the order of that memory."""
    start, gradient = torch.randn(shape), torch.randn(shape)
    served = start.transpose(-1, -2).contiguous()
    twin = served.clone()
    for tensor, of_tensor in ((served.transpose(-1, -2), gradient), (twin, gradient.transpose(-1, -2).contiguous())):
        shard = Shard("w", tuple(tensor.shape), None, (), (0,))
        parameter = OptimParameter(shard, torch.nn.Parameter(tensor), "matrix")
        optimizer = Optimizer(model.config(kind=kind), Precision.nearest, [parameter], TPGroup.single())
        parameter.tensor.grad = of_tensor.clone()
        optimizer.step()
        optimizer.zero_grad()
        assert parameter.tensor.grad is None
    assert not torch.equal(served.transpose(-1, -2), start)
    assert torch.equal(served, twin)


def test_weights_of_more_dimensions_fold_to_evenly_spaced_rows():
    """A (channels, 1, kernel) convolution folds; one whose two outer dimensions are swapped in memory does not. What has no
    more than one column, or nothing at all on this rank, has no order of columns."""
    for tensor, shape, fits in (
        (torch.zeros(6, 1, 4), (6, 1, 4), True),
        (torch.zeros(6, 2, 4), (6, 2, 4), True),
        (torch.zeros(2, 6, 4).transpose(0, 1), (6, 2, 4), False),
        (torch.zeros(1, 6).t(), (6, 1), True),
        (torch.zeros(4, 0).t(), (0, 4), True),
    ):
        dim, ranges = (0, ((0, 0),)) if not tensor.numel() else (None, ())
        shard = Shard("w", (8, 4) if not tensor.numel() else shape, dim, ranges, (0,))
        parameter = OptimParameter(shard, torch.nn.Parameter(tensor), "other")
        if fits:
            weight = Optimizer(model.config(), Precision.nearest, [parameter], TPGroup.single()).weights[0]
            assert weight.data.shape == (torch.Size(shape[:-1]).numel(), shape[-1])
            continue
        with pytest.raises(UnsupportedModelError, match="at even distances"):
            Optimizer(model.config(), Precision.nearest, [parameter], TPGroup.single())


def test_what_cannot_be_trained_is_refused():
    """No parameters, a name twice, fp16 weights and a shape that is not the shard's are refused by name."""
    params = model.parameters(TPGroup.single())
    with pytest.raises(ConfigError, match="distinct names"):
        Optimizer(model.config(), Precision.nearest, [params[0], params[0]], TPGroup.single())
    with pytest.raises(ConfigError, match="at least one"):
        Optimizer(model.config(), Precision.nearest, [], TPGroup.single())
    with pytest.raises(UnsupportedModelError, match=r"case_a.*float16.*--dtype bfloat16"):
        build(model.config(), dtype=torch.float16)
    wrong = OptimParameter(params[0].shard, torch.nn.Parameter(torch.zeros(3, 4)), "matrix")
    with pytest.raises(UnsupportedModelError, match=r"case_a.*\(3, 4\).*\(96, 64\)"):
        Optimizer(model.config(), Precision.nearest, [wrong], TPGroup.single())
