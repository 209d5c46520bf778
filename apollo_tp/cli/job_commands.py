"""Commands about jobs and samples: start a job, list them, follow one, cancel, pause or resume one; score samples."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from apollo_tp.cli import rendering
from apollo_tp.cli.answers import DryRun, Event, Job, Page, Scores, read
from apollo_tp.cli.samples import SampleFile
from apollo_tp.cli.session import OK, REFUSED, Session
from apollo_tp.errors import ConfigError

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, as `train` and `jobs` print it.")]
Samples = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="JSON Lines or a JSON array of samples (- is standard input), Parquet, or a folder of Dataset.save_to_disk.",
    ),
]
Truncate = Annotated[
    Literal["refuse", "left", "right"] | None,
    typer.Option(
        help="What becomes of samples that are too long: refused, or cut on that side.", show_default="refuse"
    ),
]
INTERRUPTED = 130
MAX_NAME = 512
"""The longest value in a job's metadata."""


def train(
    session: Session,
    file: Samples,
    follow: Annotated[bool, typer.Option("--follow", help="Show progress until the job is over.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the tokens and which are learned from.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="How often each sample is trained on.", show_default="1")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in an optimizer step.", show_default="8")] = None,
    learning_rate_scale: Annotated[
        float | None, typer.Option(help="Multiplies the trainer's learning rate, optim.lr.", show_default="1.0")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the order of samples in each epoch.", show_default="chosen by the coordinator"),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after this many steps.", show_default="all epochs")] = None,
    truncate: Truncate = None,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out samples, whose loss is measured now and then.")
    ] = None,
    guard: Annotated[
        Literal["report", "pause", "rollback"] | None,
        typer.Option(help="What to do when that loss is worse than before the job.", show_default="nothing"),
    ] = None,
    guard_every: Annotated[int | None, typer.Option(help="Steps between two looks.", show_default="10")] = None,
    max_worse: Annotated[
        float | None, typer.Option(help="By how much it may be worse, in nats per token.", show_default="0")
    ] = None,
    guard_command: Annotated[
        bool, typer.Option("--guard-command", help="Guard by the trainer's service.guard_command, not by the loss.")
    ] = False,
    higher_is_better: Annotated[
        bool, typer.Option("--higher-is-better", help="Of the number that the guard's command prints.")
    ] = False,
) -> int:
    """Train on a file of samples."""
    if learning_rate_scale is not None and not math.isfinite(learning_rate_scale):
        raise ConfigError(f"--learning-rate-scale: got {learning_rate_scale}, expected a finite number")
    options = {
        "epochs": epochs, "batch_size": batch_size, "learning_rate_scale": learning_rate_scale, "seed": seed,
        "max_steps": max_steps, "truncate": truncate,
        "validation": SampleFile(validation).samples if validation else None,
        "guard": _guard(guard, every=guard_every, max_worse=max_worse, measure="command" if guard_command else None,
                        higher_is_better=higher_is_better or None),
    }  # fmt: skip
    source = SampleFile(file)
    if str(file) != "-":
        options["metadata"] = {"name": file.resolve().name[:MAX_NAME]}
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


def _guard(action: str | None, **options: Any) -> dict[str, Any] | None:
    """The guard of a job's request. Raises ConfigError for options of a guard that is not asked for."""
    given = {name: value for name, value in options.items() if value is not None}
    if action is None:
        if given:
            raise ConfigError(f"--guard: got nothing beside {', '.join(given)}, expected report, pause or rollback")
        return None
    return {"action": action} | given


def score(session: Session, file: Samples, truncate: Truncate = None) -> int:
    """Show the log-probability of each sample of a file under the weights that are served now."""
    source = SampleFile(file)
    body = {"samples": source.samples} | ({"truncate": truncate} if truncate else {})
    content, headers = msgspec.json.encode(body), {"Content-Type": "application/json"}
    with source.located():
        answer = session.client.call("POST", "/train/score", content=content, headers=headers, timeout=None)
    session.show(answer, Scores, rendering.show_scores)
    return OK


def jobs(session: Session, limit: Annotated[int, typer.Option(help="How many.")] = 20) -> int:
    """List the latest jobs."""
    answer = session.client.call("GET", "/train/jobs", params={"limit": limit})
    session.show(read(answer, Page[Any]).data, list[Job], rendering.show_jobs)
    return OK


def job(session: Session, job_id: JobId) -> int:
    """Show one job."""
    from apollo_tp.cli.client import job_path

    session.show(session.client.call("GET", job_path(job_id)), Job, lambda job: rendering.show_jobs([job]))
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
    try:
        if session.json:
            for event in stream:
                print(json.dumps(event), flush=True)
        else:
            rendering.show_progress(job_id, stream)
    except KeyboardInterrupt:
        rendering.show_interrupted(job_id)
        return INTERRUPTED
    job = read(session.client.call("GET", job_path(job_id)), Job)
    if not session.json:
        rendering.show_end(job)
    return OK if job.state == "succeeded" else REFUSED
