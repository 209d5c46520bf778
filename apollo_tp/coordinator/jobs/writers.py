"""Figures of each step for other tools, if configured: TensorBoard, Weights & Biases, MLflow and OpenTelemetry."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.jobs import writer_tools
from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.jobs.writer_tools import Figures
from apollo_tp.wire.commands import StepFigures

log = logging.getLogger(__name__)


class Writer:
    """Calls ``write`` with the figures of each step on a thread, so that neither disk nor network delays the event loop."""

    def __init__(
        self, name: str, write: Callable[[Figures], None], close: Callable[[], object], tokens: int = 0
    ) -> None:
        self._name, self._write, self._close = name, write, close
        self._tokens = tokens
        """Of all jobs: the axis, the weight version, goes on over jobs and restarts of this process too."""
        self._queue: queue.Queue[Figures | None] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is queued, for at most ten seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(10)

    def __call__(self, job: Job, figures: StepFigures) -> None:
        """Queue the figures of a completed step; drop them if the tool is 10,000 steps behind."""
        self._tokens += figures.num_tokens
        values = {
            "tokens": float(self._tokens),
            "learning_rate": figures.learning_rate,
            "step_seconds": figures.step_seconds,
            "padding_share": figures.padding_share,
            **figures.metrics,
        }
        if not figures.skipped:
            values |= {"loss": figures.loss, "grad_norm": figures.grad_norm, "token_accuracy": figures.token_accuracy}
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((job.id, figures.weight_version, time.time(), values))

    def evaluated(self, job: Job) -> None:
        """Queue a validation loss."""
        if job.valid_loss is not None:
            values = {"valid_loss": job.valid_loss, "valid_token_accuracy": job.valid_token_accuracy or 0.0}
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((job.id, job.weight_version or 0, time.time(), values))

    def _run(self) -> None:
        try:
            while (figures := self._queue.get()) is not None:
                self._write(figures)
            self._close()
        except Exception:
            log.exception("the %s writer stopped", self._name)


TOOLS = {
    "tensorboard": ("tensorboard_dir", writer_tools.tensorboard),
    "wandb": ("wandb_project", writer_tools.wandb),
    "mlflow": ("mlflow_uri", writer_tools.mlflow),
    "otlp": ("otlp_endpoint", writer_tools.otlp),
}
"""By name of the writer: the option that asks for it, and the tool."""


def open_writers(service: ServiceConfig, store: Store) -> list[Writer]:
    """The configured writers. Raises ConfigError for a tool that is not installed, or that refuses its options."""
    asked = [(name, tool) for name, (option, tool) in TOOLS.items() if getattr(service.writers, option) is not None]
    tokens = store.count_tokens() if asked else 0
    return [Writer(name, *tool(service), tokens) for name, tool in asked]
