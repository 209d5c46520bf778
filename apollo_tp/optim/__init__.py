"""APOLLO, APOLLO-Mini and AdamW over tensor-parallel shards, written in place into bf16 weights."""

from apollo_tp.optim.interface import OptimParameter, StepOutcome
from apollo_tp.optim.optimizer import Optimizer, build_optimizer

__all__ = ["OptimParameter", "Optimizer", "StepOutcome", "build_optimizer"]
