"""Figures of each step for other tools, if configured: TensorBoard event files and Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ConfigError
from apollo_tp.wire.commands import StepFigures

log = logging.getLogger(__name__)

Figures = tuple[str, int, float, dict[str, float]]  # job id, weight version, Unix time, name -> value


class Writer:
    """Calls ``write`` with the figures of each step on a thread, so that neither disk nor network delays the event loop."""

    def __init__(self, name: str, write: Callable[[Figures], None], close: Callable[[], None], tokens: int = 0) -> None:
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


def open_writers(service: ServiceConfig, store: Store) -> list[Writer]:
    """The configured writers. Raises ConfigError if a tool is asked for that is not installed."""
    if service.writers.tensorboard_dir is None and service.writers.wandb_project is None:
        return []
    tokens = store.count_tokens()
    writers = []
    if service.writers.tensorboard_dir is not None:
        writers.append(_tensorboard(Path(service.writers.tensorboard_dir), tokens))
    if service.writers.wandb_project is not None:
        writers.append(_wandb(service, tokens))
    return writers


def _tensorboard(folder: Path, tokens: int) -> Writer:
    try:
        event_pb2 = import_module("tensorboard.compat.proto.event_pb2")
        summary_pb2 = import_module("tensorboard.compat.proto.summary_pb2")
        event_file_writer = import_module("tensorboard.summary.writer.event_file_writer")
    except ImportError as error:
        raise ConfigError(
            f"service.writers.tensorboard_dir: got a folder, but {error}; pip install tensorboard"
        ) from error
    try:
        events = event_file_writer.EventFileWriter(str(folder))
    except OSError as error:
        raise ConfigError(
            f"service.writers.tensorboard_dir: got {folder} ({error.strerror or error}), expected a writable folder"
        ) from error

    def write(figures: Figures) -> None:
        _, version, now, values = figures
        value = [summary_pb2.Summary.Value(tag=f"apollo/{name}", simple_value=v) for name, v in values.items()]
        summary = summary_pb2.Summary(value=value)
        events.add_event(event_pb2.Event(wall_time=now, step=version, summary=summary))

    return Writer("tensorboard", write, events.close, tokens)


def _wandb(service: ServiceConfig, tokens: int) -> Writer:
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise ConfigError(f"service.writers.wandb_project: got a project, but {error}; pip install wandb") from error
    settings: dict[str, Any] = {"project": service.writers.wandb_project, "mode": service.writers.wandb_mode}
    try:
        run = wandb.init(dir=service.state_dir, **settings)
    except (OSError, wandb.Error) as error:
        raise ConfigError(
            f"service.writers.wandb_project: got {service.writers.wandb_project!r}, which wandb refuses ({error}), expected "
            "a project that it can open; see service.writers.wandb_mode"
        ) from error

    def write(figures: Figures) -> None:
        job_id, version, _, values = figures
        run.log(values | {"job": job_id}, step=version)

    return Writer("wandb", write, run.finish, tokens)
