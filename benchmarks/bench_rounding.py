"""How much of an update bf16 weights keep, by precision and learning rate, and the memory for it. CPU only, half a minute.

    python benchmarks/bench_rounding.py

The optimizer trains one matrix twice on the same gradients: in bf16 with each precision, and in fp32, both from the same
bf16 weights (normal, standard deviation 0.02, as language models have them). A gradient is a tenth a lasting direction, the
rest noise. "kept" is the share of the fp32 run's displacement that the other run made, along it: 100 % says that nothing
is lost; "error" is the rest of the difference, relative to that displacement.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.optim.rounding import join
from apollo_tp.shards.boxes import Shard

SHAPE = (256, 512)
RATES = (1e-4, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7)


def trained(precision: Precision, dtype: torch.dtype, rate: float, steps: int) -> tuple[Tensor, float]:
    """(displacement fp64 of the weights after ``steps``, bytes of remainders for each weight)."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(SHAPE, generator=generator) * 0.02).bfloat16()
    weight = torch.nn.Parameter(start.to(dtype, copy=True))
    parameter = OptimParameter(Shard("w", SHAPE, None, (), (0,)), weight, "matrix")
    config = OptimConfig(lr=rate, weight_decay=0.0, check_replicas_every=0)
    optimizer = Optimizer(config, precision, [parameter], TPGroup.single())
    lasting = torch.randn(SHAPE, generator=generator)
    for _ in range(steps):
        gradient = 1e-3 * (0.1 * lasting + 0.995 * torch.randn(SHAPE, generator=generator))
        weight.grad = gradient.bfloat16().to(dtype)
        outcome = optimizer.step()
        assert outcome.skipped == "", outcome.skipped
    (written,) = optimizer.weights
    rest = 0 if written.remainder is None else written.remainder.element_size()
    return join(written.data, written.remainder).double() - start.double(), rest


def kept(precision: Precision, rate: float, steps: int) -> tuple[float, float, float]:
    """(share kept, relative error, bytes of remainders for each weight)."""
    exact, _ = trained(Precision.nearest, torch.float32, rate, steps)
    got, rest = trained(precision, torch.bfloat16, rate, steps)
    norm = float(exact.square().sum())
    return float((got * exact).sum()) / norm, (float((got - exact).square().sum()) / norm) ** 0.5, rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 200])
    args = parser.parse_args()
    for steps in args.steps:
        columns = ["precision", "bytes per weight", *(f"lr {rate:g}" for rate in RATES)]
        table = Table(*columns, title=f"kept (error), {steps} steps")
        for precision in Precision:
            found = [kept(precision, rate, steps) for rate in RATES]
            table.add_row(
                precision.value, f"{found[0][2]:g}", *(f"{share:.1%} ({error:.1%})" for share, error, _ in found)
            )
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
