"""step_metrics.csv of a fine-tuning job, which OpenAI's ``result_files`` name: made from the job's events when it is asked
for, so that it needs neither disk nor upkeep. Its rows disappear with the events of old steps."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.jobs.reader import Reader
from apollo_tp.coordinator.jobs.store import Store

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
"""OpenAI's columns, and the fields of our events that are in them."""
FURTHER = {
    "dpo": ("reward_margin", "reward_accuracy"),
    "reinforcement": ("reward_mean", "advantage_mean", "mismatch_kl", "clip_fraction", "entropy", "valid_reward_mean"),
}
"""Our columns behind these, by a job's method; named as the fields of our events are."""
PREFIX = "file-results-"
PAGE = 1000


def has_results(job: Job) -> bool:
    """Whether the job is over and has a completed step."""
    return job.source == "openai" and job.terminal and job.step > 0


def results_id(job: Job) -> str:
    """The id of the job's step_metrics.csv."""
    return PREFIX + job.id.removeprefix("ftjob-")


def job_of(store: Store, file_id: str) -> Job | None:
    """The job whose results have this id, or None."""
    if not file_id.startswith(PREFIX):
        return None
    job = store.job(f"ftjob-{file_id.removeprefix(PREFIX)}")
    return job if job is not None and has_results(job) else None


def results_csv(reader: Reader, job: Job) -> bytes:
    """The file: one row per step, as OpenAI's. Call it on a thread (Store.in_thread)."""
    text = io.StringIO()
    columns = COLUMNS | {name: name for name in FURTHER.get(job.spec.method, ())}
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(_rows(reader, job.id, columns))
    return text.getvalue().encode()


def _rows(reader: Reader, job_id: str, columns: dict[str, str]) -> Iterator[dict[str, object]]:
    row: dict[str, object] = {}
    for data in _metrics(reader, job_id):
        if row and data.get("step") != row["step"]:
            yield row
            row = {}
        # the validation of a step is an event of its own, which follows the step's; a skipped step has no loss
        if not data.get("skipped"):
            row |= {column: data[name] for column, name in columns.items() if data.get(name) is not None}
    if row:
        yield row


def _metrics(reader: Reader, job_id: str) -> Iterator[dict[str, object]]:
    after = 0
    while events := reader.events(job_id, after=after, limit=PAGE):
        after = events[-1].id
        yield from (event.data for event in events if event.type == "metrics")


def results_view(job: Job, num_bytes: int) -> dict[str, Any]:
    """The file as OpenAI's FileObject."""
    return {
        "id": results_id(job), "object": "file", "bytes": num_bytes, "created_at": int(job.finished_at or 0),
        "filename": "step_metrics.csv", "purpose": "fine-tune-results", "status": "processed", "status_details": None,
        "expires_at": None,
    }  # fmt: skip
