"""Training progress of rank 0: a bar if standard error is a terminal, a log line per step otherwise."""

from __future__ import annotations

import logging
import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from apollo_tp.wire import commands

log = logging.getLogger("apollo_tp")


class StepProgress:
    """Called on rank 0 after each step."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._job = ""

    def __call__(self, command: commands.AnyStep, figures: commands.StepFigures) -> None:
        speed = figures.num_tokens / figures.step_seconds if figures.step_seconds else 0.0
        if not sys.stderr.isatty():
            log.info(
                "job %s step %d of %d: loss %.4f, %.0f tokens/s, weight version %d%s",
                command.job_id, command.job_step, command.num_job_steps, figures.loss, speed, figures.weight_version,
                f", skipped: {figures.skipped}" if figures.skipped else "",
            )  # fmt: skip
            return
        if self._bar is None or self._job != command.job_id:
            self.close()
            self._job = command.job_id
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s"),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                f"job {command.job_id}", total=command.num_job_steps or None, loss=0, speed=0
            )
        assert self._task is not None
        self._bar.update(self._task, completed=command.job_step, loss=figures.loss, speed=speed)
        if command.job_step == command.num_job_steps:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
