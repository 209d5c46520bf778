"""The OpenAI fine-tuning routes over our jobs: what an unmodified ``openai`` program sends and expects."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.http.bodies import decode_body
from apollo_tp.coordinator.http.job_routes import add_job_routes
from apollo_tp.coordinator.http.openai_bodies import FineTuningBody, spec_of
from apollo_tp.coordinator.http.openai_results import has_results, results_id
from apollo_tp.coordinator.http.parameters import (
    METADATA_SCHEMA,
    FineTuningJobsQuery,
    PageQuery,
    PermissionsQuery,
    StrictRoute,
    idempotency,
    json_body,
)
from apollo_tp.coordinator.http.service import Service, ServiceParts, listing, unknown_cursor
from apollo_tp.coordinator.http.validation import FileValidation
from apollo_tp.coordinator.http.work import uninterrupted
from apollo_tp.coordinator.jobs.job import Checkpoint, Event, Job, State, check_guard, new_job
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.errors import refuse

JOBS = "/v1/fine_tuning/jobs"

router = APIRouter(route_class=StrictRoute)


async def _validation_of(request: Request) -> FileValidation:
    validation: FileValidation = request.app.state.validation
    return validation


@router.post(JOBS, openapi_extra=json_body(FineTuningBody))
async def create(
    request: Request, service: ServiceParts, validation: Annotated[FileValidation, Depends(_validation_of)]
) -> Response:
    """Create a fine-tuning job."""
    data = await request.body()
    key = idempotency(request, JOBS, data)
    if key and (known := service.store.repeated(*key)):
        return JSONResponse(job_view(service.find_job(known), service.scheduler))
    body = await decode_body(data, FineTuningBody)
    hello = service.scheduler.link.hello
    names = [*hello.served_model_names, hello.model_path] if hello else [body.model]
    if body.model not in names:
        raise refuse(
            "model", repr(body.model[:80]), f"the served model: {names[0]!r}", status=404, code="model_not_found"
        )
    for name in ("training_file", "validation_file"):
        file_id = getattr(body, name)
        if file_id is not None and service.store.file(file_id) is None:
            raise refuse(name, repr(file_id[:80]), "the id of an uploaded file")
    check_guard(body.guard, body.validation_file is not None, service.settings.service)
    job = new_job("openai", spec_of(body, service.settings), State.validating_files, service.scheduler.model)
    known = await uninterrupted(_store(service, validation, job, key))
    return JSONResponse(job_view(service.find_job(known), service.scheduler))


async def _store(service: Service, validation: FileValidation, job: Job, key: tuple[str, str, str] | None) -> str:
    """Store the job and begin its validation. Returns its id, or that of the job that the same request made earlier."""
    known = await service.store.add_job(job, max_queued=service.settings.service.max_queued_jobs, idempotency=key)
    if known == job.id:
        validation.start(job)
    return known


@router.get(JOBS, openapi_extra={"parameters": [METADATA_SCHEMA]})
async def list_jobs(query: Annotated[FineTuningJobsQuery, Query()], service: ServiceParts) -> Response:
    """Fine-tuning jobs, newest first; those that have all of `metadata`."""
    return JSONResponse(await service.list_jobs(query, job_view, source="openai", metadata=query.metadata))


@router.get(f"{JOBS}/{{job_id}}/events")
async def events(job_id: str, query: Annotated[PageQuery, Query()], service: ServiceParts) -> Response:
    """Events of a job, newest first."""
    job = service.find_job(job_id)
    before = None
    if query.after:
        number = query.after.removeprefix("ftevent-")
        before = int(number) if number.isascii() and number.isdigit() and len(number) < 19 else 0
        newest, _ = service.store.latest_events(job.id, before=None, limit=1)
        # the event itself may have been forgotten meanwhile: those of old steps are
        if not newest or not 0 < before <= newest[0].id:
            raise unknown_cursor(query.after, "an event of this job")
    events, more = service.store.latest_events(job.id, before=before, limit=query.limit)
    return JSONResponse(listing([_event_view(event) for event in events], more))


PERMISSIONS = "/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions"


async def permissions(checkpoint: str, query: Annotated[PermissionsQuery, Query()]) -> Response:
    """Refused: here a checkpoint is a folder, which no other project can be given access to."""
    expected = (
        "none: a checkpoint is a folder on the trainer's machine (GET /checkpoints has its path); give others a copy of it, "
        "or a token of the service (service.token_file)"
    )
    raise refuse("permissions", "a request about who may use a checkpoint", expected, code="unsupported")


for _method, _path in (("GET", PERMISSIONS), ("POST", PERMISSIONS), ("DELETE", f"{PERMISSIONS}/{{permission_id}}")):
    router.add_api_route(_path, permissions, methods=[_method])


@router.get(f"{JOBS}/{{job_id}}/checkpoints")
async def checkpoints(job_id: str, query: Annotated[PageQuery, Query()], service: ServiceParts) -> Response:
    """Checkpoints of a job, newest first."""
    job = service.find_job(job_id)
    records, more = service.page_of_checkpoints(query, job_id=job.id, state="succeeded")
    data = [_checkpoint_view(record) for record in records]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse(listing(data, more) | ends)


def job_view(job: Job, scheduler: Scheduler) -> dict[str, Any]:
    """A FineTuningJob, as the `openai` package reads it."""
    spec = job.spec
    hyperparameters: dict[str, Any] = {
        "n_epochs": spec.epochs,
        "batch_size": spec.batch_size,
        "learning_rate_multiplier": spec.learning_rate_scale,
    }
    if spec.method == "dpo":
        hyperparameters["beta"] = spec.beta
    method: dict[str, Any] = {"hyperparameters": hyperparameters}
    if spec.method == "reinforcement":
        method["grader"] = msgspec.to_builtins(spec.grader)
        method["hyperparameters"] = hyperparameters | {
            "compute_multiplier": spec.completions / scheduler.settings.rl.completions,
            "eval_interval": spec.eval_interval or "auto",
            "eval_samples": spec.eval_samples,
        }
    left = None
    if scheduler.running is job:
        left = scheduler.progress.seconds_left(job.total_steps - job.step)
    paused = job.state is State.paused
    error = None
    if job.error is not None:
        error = {"code": job.error.code, "message": job.error.message, "param": job.error.param}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "model": spec.model,
        # the served weights are the result: the served model's name is what answers with them
        "fine_tuned_model": _served_name(spec.model, scheduler) if job.state is State.succeeded else None,
        "organization_id": "apollo_tp",
        # OpenAI's type has no "paused", and clients that check it would fail on every list with such a job in it
        "status": "queued" if paused else job.state.value,
        "paused": paused,
        "hyperparameters": hyperparameters,
        "method": {"type": spec.method, spec.method: method},
        "training_file": spec.training_file,
        "validation_file": spec.validation_file or None,
        "result_files": [results_id(job)] if has_results(job) else [],
        "trained_tokens": job.tokens if job.terminal else None,
        "estimated_finish": int(time.time() + left) if left is not None else None,
        "error": error,
        "seed": spec.seed or 0,
        "metadata": spec.metadata,
        "integrations": [],
        "user_provided_suffix": spec.suffix or None,
    }


add_job_routes(router, JOBS, job_view)


def _served_name(model: str, scheduler: Scheduler) -> str:
    hello = scheduler.link.hello
    names = hello.served_model_names if hello else []
    return model if model in names or not names else names[0]


def _event_view(event: Event) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.time),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.type == "metrics" else "message",
        "data": event.data,
    }


def _checkpoint_view(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.finished_at or checkpoint.created_at),
        "fine_tuned_model_checkpoint": checkpoint.path,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
    }
