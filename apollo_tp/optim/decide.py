"""The decision of a step in plain torch: for CPU, and as the oracle of the kernel in ``decide_kernel``."""

from __future__ import annotations

import torch

from apollo_tp.config import OptimConfig, OptimizerKind
from apollo_tp.optim.interface import Decision, Facts, Sums


def decide(learning_rate: float, sums: Sums, facts: Facts, config: OptimConfig) -> Decision:
    """Which parameters to write, with which coefficients. Moves ``facts.limiter_norms``; no collective, in fp64.

    The norm of a matrix's update is limited to ``norm_growth_limit`` times what the limiter let through the last time
    (APOLLO, arXiv 2412.05270, section 4, and its published code), but for embedding and head: what a batch moves of these
    grows with its number of tokens, and a short one would hold up those after it. Nothing is written if a canary is not
    what it must be, a sum is not finite, or a matrix would move by more than ``max_relative_update`` of its norm. Only
    finite sums give finite coefficients.
    """
    projected, limited, squares = facts.projected > 0, facts.projected > 1, sums.squares[:-1].double()
    one = torch.ones_like(facts.corrections)
    norm, inner = sums.norms[:, 0].double().sqrt(), one
    if config.kind is OptimizerKind.apollo_mini:
        mini = norm / (sums.norms[:, 1].double().sqrt() + 1e-8)
        inner = torch.where(projected, mini, inner)
        norm = torch.where(projected, mini * sums.clip * squares.sqrt(), norm)
    excess = one
    if config.norm_growth_limit is not None:
        gamma = config.norm_growth_limit
        excess = (norm / (facts.limiter_norms[facts.places] + 1e-8)).clamp(min=gamma) / gamma
        excess = torch.where((facts.steps > 0) & limited, excess, one)
    factor = torch.where(projected, learning_rate * facts.corrections * facts.root_scales, learning_rate) / excess
    active = squares > 0
    relative = torch.where(active, factor * norm / facts.weight_norms[facts.places], 0.0)
    finite = torch.isfinite(sums.squares).all() & torch.isfinite(sums.norms).all()
    checked = (sums.checks == facts.checks).all()
    good = checked & finite & (relative <= config.max_relative_update).all()
    write = active & good & (sums.alive == facts.checks[0])
    facts.limiter_norms[facts.places] = torch.where(write, norm / excess, facts.limiter_norms[facts.places])
    report = [checked[None], finite[None], squares.sum()[None], write, relative]
    return Decision(
        learning_rate=learning_rate,
        clip=sums.clip,
        write=write.to(torch.int32),
        coefficients=(factor * inner * sums.clip).float(),
        good=good.to(torch.int32),
        report=torch.cat([part.double() for part in report]),
        local_sums=sums.local_squares,
    )
