"""Answers as people read them: plain lines, tables, and a job's progress bar."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from apollo_tp.cli.answers import Checkpoint, DryRun, Event, Job, Plan, Push, Scores, Status, read

# texts of models, jobs and errors are shown as they are: brackets in them are no markup
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(highlight=False, markup=False, emoji=False, stderr=True)
for console in (out, err):
    if not console.is_terminal:
        console.width = 10_000  # in a pipe nothing is cut or wrapped
LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal for a bar."""


def show_status(status: Status) -> None:
    """The trainer, the running job and the queue."""
    trainer, job = status.trainer, status.running
    dot = "*" if out.options.ascii_only else "●"
    if trainer.connected:
        names = ", ".join(f"{replica['instance_id']} on {replica['host']}" for replica in trainer.replicas)
        here, wanted = len(trainer.replicas), trainer.num_replicas
        count = f"{here}" if here == wanted else f"{here} of {wanted}"
        served = f" of {count} replicas ({names})" if wanted > 1 else ""
        line = f" {trainer.model} on {trainer.num_ranks} ranks{served}, {trainer.optimizer}"
    else:
        line = f" no trainer: {trainer.reason}"
    out.print(Text(dot, "green" if trainer.connected else "red").append(line, "default"))
    out.print(f"weight version {trainer.weight_version}, {'not yet saved' if status.unsaved else 'saved'}")
    if job:
        left = f", {job.seconds_left:.0f} s left" if job.seconds_left is not None else ""
        speed = f", {job.tokens_per_second:.0f} tokens/s" if job.tokens_per_second else ""
        out.print(f"running {job.id}: step {job.step}/{job.total_steps}{job.loss_text}{speed}{left}")
    for waiting in status.queue:
        out.print(f"{waiting.state:8} {waiting.id}: step {waiting.step}/{waiting.total_steps}")


def show_jobs(jobs: list[Job]) -> None:
    table = Table("job", "state", "step", "loss", "tokens", box=None)
    for job in jobs:
        loss = "" if job.loss is None else f"{job.loss:.4f}"
        table.add_row(job.id, job.state, f"{job.step}/{job.total_steps}", loss, str(job.tokens))
    out.print(table)


def show_checkpoints(checkpoints: list[Checkpoint]) -> None:
    table = Table("checkpoint", "name", "state", "folder", box=None)
    for each in checkpoints:
        table.add_row(each.id, each.name, each.state, each.path or each.error or "")
    out.print(table)


def show_scores(scores: Scores) -> None:
    """A line for each sample, in their order."""
    for score in scores.data:
        out.print("not finite" if score.logprob is None else f"{score.logprob:.4f}")


def show_layout(rows: list[dict[str, Any]]) -> None:
    """A table with the keys of the first row as columns."""
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(":".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in row.values()))
    out.print(table)


def show_dry_run(answer: DryRun) -> None:
    """The tokens of each sample, those that are learned from in green, or between marks where there is no colour."""
    coloured = out.is_terminal and not out.no_color
    begin, end = ("", "") if coloured else ("[", "]") if out.options.ascii_only else ("«", "»")
    for sample in answer.samples:
        tokens = sample.tokens or [f"{token} " for token in sample.token_ids]
        line = Text()
        for learned, run in itertools.groupby(zip(tokens, sample.weights, strict=True), key=lambda each: bool(each[1])):
            text = "".join(token for token, _ in run)
            line.append(f"{begin}{text}{end}" if learned else text, "green" if learned else "dim")
        out.print(line)
    for form, count in answer.converted.items():
        out.print(f"{count} {'sample' if count == 1 else 'samples'} of {form}'s form converted to messages")
    marked = "" if coloured else f" (between {begin} and {end})"
    out.print(f"{answer.num_tokens} tokens, {answer.num_loss_tokens} learned from{marked}; {answer.total_steps} steps")


def show_checkpoint(checkpoint: Checkpoint) -> None:
    """The folder of a checkpoint, or why there is none."""
    out.print(checkpoint.path or f"{checkpoint.state}: {checkpoint.error}")


def show_restore(checkpoint: Checkpoint) -> None:
    """What became of the request to put a checkpoint back."""
    restore = checkpoint.restore
    assert restore is not None
    if restore.state != "succeeded":
        out.print(f"{restore.state}: {restore.error}")
        return
    took = f" in {restore.seconds:.1f} s, requests held for {restore.paused_seconds:.1f} s" if restore.seconds else ""
    out.print(f"{checkpoint.path} restored{took}; weight version {restore.weight_version}")


def show_push(push: Push) -> None:
    """Each file with its size, what was removed, and where it is now."""
    table = Table("file", Column("bytes", justify="right"), box=None)
    for file in push.files:
        table.add_row(file.path, f"{file.bytes:,}")
    out.print(table)
    for name in push.removed:
        out.print(f"removed from the repository: {name}, weights of an earlier upload")
    what = f"{len(push.files)} files, {push.bytes:,} bytes of {push.folder}"
    where = f"{push.repo_id}, revision {push.revision}"
    out.print(f"{what} uploaded to {where}: {push.url}" if push.url else f"{what} would be uploaded to {where}")


def show_event(event: Event) -> None:
    """An event as one line."""
    out.print(f"{event.id:6} {event.level:5} {event.message}")


def show_action(job: Job) -> None:
    """The state of a job that was asked to do something."""
    out.print(f"{job.id}: {job.state}{f', {job.wanted} asked' if job.wanted else ''}")


def show_plan(plan: Plan) -> None:
    """A row for each choice of options, GB on each GPU; then the commands of the first that fits."""
    names = list(plan.choices[0].bytes)
    table = Table("", *names, "total", "", "tokens/s", title=f"GB on each of {plan.gpus} x {plan.gpu}, "
                  f"{plan.bytes_per_gpu / 1e9:.1f} each: {plan.num_parameters / 1e9:.2f}B parameters")  # fmt: skip
    for choice in plan.choices:
        verdict = "fits" if choice.fits else f"{(choice.total - plan.bytes_per_gpu) / 1e9:.1f} too much"
        if not choice.fits and choice.largest_micro_batch_tokens >= 2:
            verdict += f"; {choice.largest_micro_batch_tokens} tokens would fit"
        parts = [f"{choice.bytes[name] / 1e9:.1f}" for name in names]
        speed = "" if choice.tokens_per_second is None else f"{choice.tokens_per_second:,.0f}"
        # the first two options say how many tokens, which all rows have
        table.add_row(
            "\n".join(choice.overrides[2:]) or "defaults", *parts, f"{choice.total / 1e9:.1f}", verdict, speed
        )
    out.print(table, soft_wrap=False)
    if plan.overrides is None:
        out.print("it does not fit; try more GPUs, fewer --tokens, or less --length and --concurrency")
    else:
        out.print(
            f"it fits: apollo-tp serve {plan.model} --tensor-parallel-size {plan.tensor_parallel_size} --max-model-len "
            f"{plan.length} --gpu-memory-utilization {plan.gpu_memory_utilization} -- {' '.join(plan.overrides)}"
        )
    out.print(plan.sources)


def show_end(job: Job) -> None:
    out.print(f"{job.id}: {job.state}{job.loss_text}")


def show_progress(job_id: str, events: Iterable[Any]) -> None:
    """A progress bar with the latest loss while the events of a job last, or a line now and then where there is no terminal;
    other events are lines above it."""
    if not err.is_terminal:
        _show_lines(job_id, events)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=err) as bar:
        task = bar.add_task(job_id, total=None, figures="")
        for event in (read(answer, Event) for answer in events):
            data = event.data
            if event.type == "metrics" and data.get("train_loss") is not None:
                speed = data.get("tokens_per_second")
                figures = f"loss {data['train_loss']:.4f}" + (f", {speed:.0f} tokens/s" if speed else "")
                bar.update(task, completed=data["step"], total=data["total_steps"], figures=figures)
            else:
                err.print(event.message)


def _show_lines(job_id: str, events: Iterable[Any]) -> None:
    """The first and the last step, and one every LINE_SECONDS; all other events."""
    shown = -math.inf
    for event in (read(answer, Event) for answer in events):
        data = event.data
        if event.type != "metrics" or data.get("train_loss") is None:
            err.print(event.message)
        elif time.monotonic() - shown >= LINE_SECONDS or data["step"] == data["total_steps"]:
            shown = time.monotonic()
            err.print(f"{job_id}: step {data['step']}/{data['total_steps']}, loss {data['train_loss']:.4f}")


def show_interrupted(job_id: str) -> None:
    """A follower was ended by Ctrl-C, which its job was not."""
    follow, cancel = (f"`apollo-tp {words}`" for words in (f"events {job_id} --follow", f"cancel {job_id}"))
    err.print(f"{job_id} goes on; {follow} follows it, {cancel} ends it", soft_wrap=True)


def show_line(text: str) -> None:
    err.print(text, soft_wrap=True)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on standard error, if that is a terminal."""
    with err.status(text):
        yield


def show_broken_connection() -> None:
    """Report on standard error that the connection is made again."""
    err.print("the connection broke; connecting again, and continuing after the last event", style="dim")
