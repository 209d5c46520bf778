"""The decision of a step as one Triton kernel. In plain torch it is many operations on a few hundred numbers each, for which
the device would wait on a slow host. ``torch_backend.decide`` is its twin; ``TritonBackend`` chooses between the two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apollo_tp.config import OptimConfig, OptimizerKind
from apollo_tp.optim.sharding import Decision, DecisionInputs, GradientStats

BLOCK = 1024
"""Parameters at a time. One program takes all of them, since each is written only if all are good."""


@triton.jit
def _update(
    i,  # numbers of the parameters
    inside,  # which of them exist
    tensors,  # the pointers of decide_kernel
    clip,
    rate,
    gamma,
    MINI: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """(squared gradient norm, norm of the update before the limiter, what the limiter divides it by, what multiplies it,
    the part of the coefficient that is not in that), all fp64."""
    squares, norms, projected, root_scales, indices, limiter_norms, corrections, steps = tensors
    square = tl.load(squares + i, mask=inside, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.load(norms + 2 * i, mask=inside, other=0.0).to(tl.float64))
    kind = tl.load(projected + i, mask=inside, other=0)
    is_projected = kind > 0
    inner = tl.full(i.shape, 1.0, tl.float64)
    if MINI:
        mini = norm / (tl.sqrt(tl.load(norms + 2 * i + 1, mask=inside, other=0.0).to(tl.float64)) + 1e-8)
        inner = tl.where(is_projected, mini, inner)
        norm = tl.where(is_projected, mini * clip * tl.sqrt(square), norm)
    factor = tl.load(corrections + i, mask=inside, other=0.0) * tl.load(root_scales + i, mask=inside, other=0.0)
    factor = tl.where(is_projected, factor, 1.0) * rate
    excess = tl.full(i.shape, 1.0, tl.float64)
    if LIMITED:
        old = tl.load(limiter_norms + tl.load(indices + i, mask=inside, other=0), mask=inside, other=0.0)
        growth = norm / (old + 1e-8)
        later = tl.load(steps + i, mask=inside, other=0) > 0
        excess = tl.where((kind > 1) & later & (growth > gamma), growth / gamma, excess)
    return square, norm, excess, factor / excess, inner


@triton.jit
def decide_kernel(
    squares,  # fp32 (parameters + 1,)
    norms,  # fp32 (parameters, 2)
    clip_at,  # fp32, one element
    alive,  # fp32, one element
    checks,  # fp32 (num_checks,): the canaries
    expected,  # fp32 (num_checks,): what they must be; the first is the number of ranks
    projected,  # int32 (parameters,)
    root_scales,  # fp64 (parameters,)
    indices,  # int64 (parameters,): of limiter_norms and weight_norms
    limiter_norms,  # fp64 (parameters of the model,), updated
    weight_norms,  # fp64 (parameters of the model,)
    corrections,  # fp64 (parameters,)
    steps,  # int32 (parameters,)
    rate_at,  # fp64, one element: the learning rate
    limits,  # fp64 (2,): growth of the norm, relative update
    write,  # int32 (parameters,), out
    coefficients,  # fp32 (parameters,), out
    good_at,  # int32, one element, out
    report,  # fp64 (3 + 2 * parameters,), out
    count,  # parameters
    num_checks,
    MINI: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: all parameters once to see whether all are good, and once more to say what is written."""
    clip = tl.load(clip_at).to(tl.float64)
    rate, gamma, limit = tl.load(rate_at), tl.load(limits), tl.load(limits + 1)
    tensors = (squares, norms, projected, root_scales, indices, limiter_norms, corrections, steps)
    num_wrong = tl.full((), 0, tl.int32)
    for start in range(0, num_checks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < num_checks
        equal = tl.load(checks + i, mask=inside, other=0.0) == tl.load(expected + i, mask=inside, other=0.0)
        num_wrong += tl.sum((inside & (equal == 0)).to(tl.int32), axis=0)  # NaN is not equal to anything
    infinity = float("inf")
    not_finite = 1 - (tl.abs(tl.load(squares + count)) < infinity).to(tl.int32)  # of a loss; a NaN is not less either
    too_long = not_finite * 0
    total = tl.full((), 0, tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        square, norm, excess, factor, inner = _update(i, inside, tensors, clip, rate, gamma, MINI, LIMITED)
        index = tl.load(indices + i, mask=inside, other=0)
        share = tl.where(square > 0, factor * norm / tl.load(weight_norms + index, mask=inside, other=1.0), 0.0)
        first = tl.load(norms + 2 * i, mask=inside, other=0.0)
        second = tl.load(norms + 2 * i + 1, mask=inside, other=0.0)
        finite = (tl.abs(square) < infinity) & (tl.abs(first) < infinity) & (tl.abs(second) < infinity)
        not_finite += tl.sum((inside & (finite == 0)).to(tl.int32), axis=0)
        too_long += tl.sum((inside & ((share <= limit) == 0)).to(tl.int32), axis=0)
        total += tl.sum(square, axis=0)
        tl.store(report + 3 + count + i, share, mask=inside)
    good = (num_wrong == 0) & (not_finite == 0) & (too_long == 0)
    tl.store(report, (num_wrong == 0).to(tl.float64))
    tl.store(report + 1, (not_finite == 0).to(tl.float64))
    tl.store(report + 2, total)
    tl.store(good_at, good.to(tl.int32))
    allowed = (good & (tl.load(alive) == tl.load(expected))).to(tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        square, norm, excess, factor, inner = _update(i, inside, tensors, clip, rate, gamma, MINI, LIMITED)
        flag = tl.where(square > 0, allowed, 0)
        tl.store(write + i, flag, mask=inside)
        tl.store(report + 3 + i, flag.to(tl.float64), mask=inside)
        tl.store(coefficients + i, (factor * inner * clip).to(tl.float32), mask=inside)
        index = tl.load(indices + i, mask=inside, other=0)
        tl.store(limiter_norms + index, norm / excess, mask=inside & (flag != 0))


class DecideOnDevice:
    """``torch_backend.decide`` as one launch. ``limits`` of the configuration lie on the device from the start."""

    def __init__(self, config: OptimConfig, device: torch.device) -> None:
        limited = config.norm_growth_limit is not None
        growth = config.norm_growth_limit if limited else 1.0
        self.limits = torch.tensor([growth, config.max_relative_update], dtype=torch.float64, device=device)
        self.options = {"MINI": config.kind is OptimizerKind.apollo_mini, "LIMITED": limited}

    def __call__(self, stats: GradientStats, inputs: DecisionInputs) -> Decision:
        """See ``torch_backend.decide``. Does not wait for the device."""
        device, count = self.limits.device, inputs.steps.numel()
        report = torch.empty(3 + 2 * count, dtype=torch.float64, device=device)
        flags = torch.empty(count + 1, dtype=torch.int32, device=device)
        write, good = flags[:count], flags[count]
        coefficients = torch.empty(count, device=device)
        decide_kernel[(1,)](
            stats.squares,
            stats.norms,
            stats.clip,
            stats.alive,
            stats.checks,
            inputs.expected_checks,
            inputs.projected,
            inputs.root_scales,
            inputs.indices,
            inputs.limiter_norms,
            inputs.weight_norms,
            inputs.corrections,
            inputs.steps,
            inputs.learning_rate,
            self.limits,
            write,
            coefficients,
            good,
            report,
            count,
            inputs.expected_checks.numel(),
            **self.options,
            BLOCK=BLOCK,
            num_warps=8,
        )
        return Decision(stats.clip, write, coefficients, good, report, stats.local_squares)
