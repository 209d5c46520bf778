"""APOLLO, APOLLO-Mini and AdamW over tensor-parallel shards, written in place into bf16 weights."""

from apollo_tp.optim.apollo import Optimizer, build_optimizer
from apollo_tp.optim.interface import OptimParameter, StepOutcome

__all__ = ["OptimParameter", "Optimizer", "StepOutcome", "build_optimizer"]
