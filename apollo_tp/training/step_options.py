"""Options of a single optimizer step, in place of the configured ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from apollo_tp.config import OptimConfig, Schedule
from apollo_tp.errors import ConfigError


@dataclass(frozen=True)
class StepOptions:
    """None leaves what is configured. ``learning_rate`` replaces the scheduled one; ``max_grad_norm`` 0 switches clipping
    off."""

    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None

    @contextlib.contextmanager
    def applied_to(self, config: OptimConfig) -> Iterator[None]:
        """Within the context, ``config``, which all parts of the optimizer read at each step, has these options. Raises
        ConfigError for values that it cannot have, and for clipping where it is switched off: its sum over ranks is made
        when the optimizer is."""
        values = {name: getattr(self, name) for name in ("betas", "eps", "weight_decay")}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        if self.learning_rate is not None:
            given |= {"lr": self.learning_rate, "schedule": Schedule.constant, "warmup_steps": 0}
        if config.max_grad_norm is not None and self.max_grad_norm is not None:
            given["max_grad_norm"] = self.max_grad_norm or math.inf
        elif self.max_grad_norm:
            raise ConfigError(
                f"max_grad_norm: got {self.max_grad_norm} for a step, expected 0 or nothing, since the trainer was started "
                "with optim.max_grad_norm=null; start it with a number"
            )
        replace(config, **given)  # which checks them
        before = {name: getattr(config, name) for name in given}
        try:
            for name, value in given.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)
