"""Learning rate by optimizer step, counted over all jobs (the count is part of the saved state)."""

from __future__ import annotations

import math

from apollo_tp.config import OptimConfig, Schedule

COSINE_FLOOR = 0.1
"""A cosine schedule ends at this share of the learning rate, as in the APOLLO paper's recipe; a linear one at 0."""


def learning_rate(config: OptimConfig, step_count: int) -> float:
    """The learning rate of the step after ``step_count`` completed ones; the end value holds after ``total_steps``."""
    warmup = min(1.0, (step_count + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule is Schedule.constant or step_count < config.warmup_steps:
        return config.lr * warmup
    assert config.total_steps is not None  # OptimConfig checks it
    progress = (step_count - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    if config.schedule is Schedule.linear:
        return config.lr * (1.0 - progress)
    return config.lr * (COSINE_FLOOR + (1.0 - COSINE_FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress)))
