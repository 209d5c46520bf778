"""Commands about jobs: start one, list them, follow one, and cancel, pause or resume one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from apollo_tp.cli import rendering
from apollo_tp.cli.answers import DryRun, Event, Job, Page, read
from apollo_tp.cli.samples import SampleFile
from apollo_tp.cli.session import OK, REFUSED, Session
from apollo_tp.errors import ConfigError

JobId = Annotated[str, typer.Argument(metavar="ID")]


def train(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="One sample per line; - is standard input.")],
    follow: Annotated[bool, typer.Option("--follow", help="Show progress until the job is over.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the tokens and which are learned from.")
    ] = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate_scale: float | None = None,
    seed: int | None = None,
    max_steps: int | None = None,
    truncate: Literal["refuse", "left", "right"] | None = None,
) -> int:
    """Train on a JSONL file of samples."""
    if learning_rate_scale is not None and not math.isfinite(learning_rate_scale):
        raise ConfigError(f"--learning-rate-scale: got {learning_rate_scale}, expected a finite number")
    options = {
        "epochs": epochs, "batch_size": batch_size, "learning_rate_scale": learning_rate_scale, "seed": seed,
        "max_steps": max_steps, "truncate": truncate,
    }  # fmt: skip
    source = SampleFile(file)
    body = {name: value for name, value in options.items() if value is not None} | {"samples": source.samples}
    content, headers = msgspec.json.encode(body), {"Content-Type": "application/json"}
    query = {"dry_run": "true"} if dry_run else {}
    with source.located():
        answer = session.client.call("POST", "/train", content=content, headers=headers, params=query)
    if dry_run:
        session.show(answer, DryRun, rendering.show_dry_run)
        return OK
    job = read(answer, Job)
    if follow:
        return _follow(session, job.id)
    session.show(answer, Job, lambda job: print(job.id))
    return OK


def jobs(session: Session, limit: int = 20) -> int:
    """List the latest jobs."""
    answer = session.client.call("GET", "/train/jobs", params={"limit": limit})
    session.show(read(answer, Page[Any]).data, list[Job], rendering.show_jobs)
    return OK


def events(
    session: Session,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for further ones until the job is over.")] = False,
) -> int:
    """List the events of a job."""
    from apollo_tp.cli.client import job_path

    if follow:
        return _follow(session, job_id)
    after, more = 0, True
    while more:
        query = {"limit": 10_000, "after": after}
        page = read(session.client.call("GET", f"{job_path(job_id)}/events", params=query), Page[Any])
        more = page.has_more
        for event in page.data:
            after = read(event, Event).id
            session.show(event, Event, rendering.show_event)
    return OK


def action(name: str) -> Callable[..., int]:
    """The command that asks for ``name``: cancel, pause or resume."""

    def act(session: Session, job_id: JobId) -> int:
        from apollo_tp.cli.client import job_path

        answer = session.client.call("POST", f"{job_path(job_id)}/{name}")
        session.show(answer, Job, rendering.show_action)
        return OK

    act.__name__, act.__doc__ = name, f"{name.capitalize()} a job; a running one at its next step."
    return act


def _follow(session: Session, job_id: str) -> int:
    from apollo_tp.cli.client import job_path

    stream = session.client.events(job_id, rendering.show_broken_connection)
    if session.json:
        for event in stream:
            print(json.dumps(event), flush=True)
    else:
        rendering.show_progress(job_id, stream)
    job = read(session.client.call("GET", job_path(job_id)), Job)
    if not session.json:
        rendering.show_end(job)
    return OK if job.state == "succeeded" else REFUSED
