"""APOLLO, APOLLO-Mini and AdamW over tensor-parallel shards, written in place into bf16 weights.

A step is decided from numbers that were summed over all ranks, before anything is written: all ranks write, or none. The
plain definition is ``tests/support/reference_optimizer.py``; how it works is in docs/explanation/optimizer.md.
"""

from apollo_tp.optim.optimizer import Optimizer, StepOutcome
from apollo_tp.optim.parameters import OptimParameter

__all__ = ["OptimParameter", "Optimizer", "StepOutcome"]
