"""The routes of the trainer's own API: /train, its jobs and events, /checkpoint, /health."""

from __future__ import annotations

import asyncio
import collections
import functools
import logging
import math
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from apollo_tp.coordinator.http.bodies import decode_body
from apollo_tp.coordinator.http.job_routes import add_job_routes
from apollo_tp.coordinator.http.job_samples import sample_view
from apollo_tp.coordinator.http.parameters import (
    EventsQuery,
    PageQuery,
    StrictRoute,
    TrainQuery,
    WaitQuery,
    idempotency,
    json_body,
)
from apollo_tp.coordinator.http.service import Service, ServiceParts, found, listing
from apollo_tp.coordinator.http.views import event_stream, events_page, job_view
from apollo_tp.coordinator.http.work import IsAbandoned, uninterrupted, while_connected
from apollo_tp.coordinator.jobs.job import (
    Checkpoint,
    Job,
    JobSpec,
    State,
    check_guard,
    new_job,
    plan_total_steps,
    spec_of,
)
from apollo_tp.coordinator.samples.body import Samples, read_body
from apollo_tp.coordinator.samples.forms import converted_from
from apollo_tp.coordinator.samples.sample_file import write_records
from apollo_tp.coordinator.samples.schema import (
    MAX_SAMPLES,
    MAX_SCORED,
    Body,
    CheckpointBody,
    PairsBody,
    ScoreBody,
    ScoreOptions,
    TrainBody,
    Truncate,
    decode,
)
from apollo_tp.errors import RequestError, refuse
from apollo_tp.wire.commands import Sample

log = logging.getLogger(__name__)

STREAMS_PER_CLIENT = 64
MAX_DRY_RUN_BYTES = 8 * 2**20
"""The answer of a dry run is several times as large as its body, and is made in memory."""

router = APIRouter(route_class=StrictRoute)


@router.post("/train", status_code=202, openapi_extra=json_body(TrainBody))
async def train(request: Request, query: Annotated[TrainQuery, Query()], service: ServiceParts) -> Response:
    """Queue a job (202), or wait for its end (200); `?dry_run=true` only shows the tokens and their weights."""
    async with service.large_bodies.received(request) as data:
        if query.dry_run:
            shown = await service.dry_runs.run(request, functools.partial(_dry_run, service, data))
            return Response(shown, media_type="application/json")
        body, job_id, headers = await _accept(service, request, data)
    return await _answer(service, query, body, job_id, headers)


async def _accept(service: Service, request: Request, data: Body) -> tuple[TrainBody, str, dict[str, str]]:
    """Store the job of a request, unless that was done when the request came the first time. Returns the body, the job's id
    and headers of the answer."""
    key = await asyncio.to_thread(idempotency, request, "/train", data)
    if key and (known := service.store.repeated(*key)):
        body, _ = await service.samples.run(request, lambda _: read_body(data, TrainBody, MAX_SAMPLES))
        return body, known, {"Idempotent-Replay": "true"}
    service.store.check_room(service.settings.service.max_queued_jobs)
    with service.storing(len(data)):
        body, job = await service.samples.run(request, functools.partial(_write, service, data))
        return body, await uninterrupted(_store(service, job, key)), {}


async def submit(service: Service, key: str, data: bytes, method: str) -> str:
    """Store the job of a POST /train body that this process has made, or of a PairsBody (method "dpo"), once for ``key``.
    Returns its id; raises RequestError."""
    idempotency_key = ("feedback", key, "")
    if known := service.store.repeated(*idempotency_key):
        return known
    service.store.check_room(service.settings.service.max_queued_jobs)
    with service.storing(len(data)):
        if method == "dpo":
            job = await asyncio.to_thread(_write_pairs, service, data)
        else:
            _, job = await asyncio.to_thread(_write, service, data, lambda: False)
        return await uninterrupted(_store(service, job, idempotency_key))


async def _answer(
    service: Service, query: TrainQuery, body: TrainBody, job_id: str, headers: dict[str, str]
) -> Response:
    """The job: 200 once it is over, for which this waits if asked to; else 202."""
    if body.wait or query.wait:
        await service.wait(lambda: service.find_job(job_id).terminal, body.wait_seconds)
    job = service.find_job(job_id)
    headers = {"Location": f"/train/jobs/{job.id}"} | headers
    return JSONResponse(job_view(job, service.scheduler), status_code=200 if job.terminal else 202, headers=headers)


def _write(service: Service, data: Body, is_abandoned: IsAbandoned) -> tuple[TrainBody, Job]:
    """Write the samples of a request, one after the other, and make their job. Runs on a thread."""
    store = service.store
    body, given = read_body(data, TrainBody, MAX_SAMPLES)
    job = new_job("train", spec_of(body), State.queued, service.scheduler.model)
    path = store.samples_dir / f"{job.id}.train"
    samples = service.intake(body.truncate, is_abandoned).train_samples(body, given)
    check_guard(body.guard, body.validation is not None, service.settings.service)
    held_out = service.intake(body.truncate, is_abandoned).samples(body.validation or [], "validation")
    job.num_samples = write_records(path, samples)
    if held_out:
        job.num_validation = write_records(path.with_suffix(".valid"), held_out)
    if is_abandoned():  # nobody takes the job
        path.unlink()
        path.with_suffix(".valid").unlink(missing_ok=True)
    job.total_steps = plan_total_steps(job.spec, job.num_samples)
    return body, job


def _write_pairs(service: Service, data: bytes) -> Job:
    """Write the pairs of a PairsBody that can be used, and make their job of one step. Runs on a thread."""
    body = decode(data, PairsBody)
    spec = JobSpec(
        method="dpo", batch_size=len(body.pairs), beta=body.beta, learning_rate_scale=body.learning_rate_scale,
        truncate=Truncate.left, guard=body.guard, metadata=body.metadata,
    )  # fmt: skip
    job = new_job("train", spec, State.queued, service.scheduler.model)
    intake, pairs = service.intake(spec.truncate, lambda: False), []
    for index, line in enumerate(body.pairs):
        try:
            pairs.append(intake.pair(line))
        except RequestError as error:
            if error.status != 400:
                raise
            log.warning("pair %d of %s is left out: %s", index, body.metadata, error)
    if not pairs:
        raise refuse("pairs", "none that can be used", "at least one")
    job.num_samples = write_records(service.store.samples_dir / f"{job.id}.train", pairs)
    job.total_steps = plan_total_steps(spec, job.num_samples)
    return job


async def _store(service: Service, job: Job, key: tuple[str, str, str] | None) -> str:
    """Store the job, whose samples are written. Returns its id, or that of the job that the same request made earlier."""
    store, limit = service.store, service.settings.service.max_queued_jobs
    known = ""
    try:
        for part in ("train", "valid")[: 1 + (job.num_validation > 0)]:
            store.disk.count(store.samples_dir / f"{job.id}.{part}")
        known = await store.add_job(job, max_queued=limit, idempotency=key)
    finally:
        if known != job.id:
            await asyncio.to_thread(store.disk.remove_samples, job.id)
    service.scheduler.wake()
    return known


def _dry_run(service: Service, data: Body, is_abandoned: IsAbandoned) -> bytes:
    if len(data) > MAX_DRY_RUN_BYTES:
        raise refuse("body", f"{len(data)} bytes in a dry run", f"at most {MAX_DRY_RUN_BYTES} to be shown", status=413,
                     code="body_too_large")  # fmt: skip
    body, given = read_body(data, TrainBody, MAX_SAMPLES)
    samples = list(service.intake(body.truncate, is_abandoned).train_samples(body, given))
    answer = {
        "object": "train.dry_run",
        "samples": [sample_view(service, sample) for sample in samples],
        "num_tokens": sum(len(sample.token_ids) for sample in samples),
        "num_loss_tokens": sum(weight > 0 for sample in samples for weight in sample.weights),
        "total_steps": plan_total_steps(spec_of(body), len(samples)),
        "converted": _converted(given),
    }
    return msgspec.json.encode(answer)


def _converted(given: Samples | None) -> dict[str, int]:
    """How many samples, which were accepted, have been converted to messages, by their format."""
    return collections.Counter(form for each in (given.elements() if given else ()) if (form := converted_from(each)))


@router.post("/train/score", openapi_extra=json_body(ScoreBody))
async def score(request: Request, service: ServiceParts) -> Response:
    """Log-probabilities of samples under the trainer's weights of this moment, for `apollo-tp compare`. Trains nothing."""
    async with service.large_bodies.received(request) as data:
        samples, per_token = await service.samples.run(request, functools.partial(_read_scored, service, data))
    scores = await while_connected(request, service.scheduler.score(samples, per_token))
    listed: list[dict[str, Any]] = []
    for sample, scored in zip(samples, scores, strict=True):
        logprob = scored.logprob if math.isfinite(scored.logprob) else None
        view = {"logprob": logprob, "weight": scored.weight, "correct": scored.num_correct}
        listed.append(view | {"num_tokens": len(sample.token_ids)})
        if per_token:
            pairs = zip(scored.token_logprobs, sample.weights, strict=True)
            listed[-1]["token_logprobs"] = [
                value if weight and math.isfinite(value) else None for value, weight in pairs
            ]
    return JSONResponse(
        {"object": "train.score", "weight_version": service.scheduler.link.weight_version, "data": listed}
    )


def _read_scored(service: Service, data: Body, is_abandoned: IsAbandoned) -> tuple[list[Sample], bool]:
    body, given = read_body(data, ScoreOptions, MAX_SCORED)
    if given is None:
        raise refuse("samples", "nothing", f"a list of 1 to {MAX_SCORED} samples")
    return service.intake(body.truncate, is_abandoned).samples(given), body.per_token


@router.get("/train/status")
async def status(service: ServiceParts) -> Response:
    """The trainer, the running job, the queue, the last losses and the last checkpoint."""
    return Response(service.status.body(), media_type="application/json")


@router.get("/train/layout")
async def layout(request: Request, service: ServiceParts) -> Response:
    """Which part of which checkpoint tensor lies on which rank; 304 to an If-None-Match with the ETag of the answer."""
    body, tag = service.layout.body(service.scheduler.link.hello)
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    known = request.headers.get("if-none-match", "")
    if known.strip() == "*" or tag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/train/jobs")
async def jobs(query: Annotated[PageQuery, Query()], service: ServiceParts) -> Response:
    """Jobs of both APIs, newest first."""
    return JSONResponse(await service.list_jobs(query, job_view))


add_job_routes(router, "/train/jobs", job_view)


@router.get("/train/jobs/{job_id}/events")
async def events(
    request: Request, job_id: str, query: Annotated[EventsQuery, Query()], service: ServiceParts
) -> Response:
    """Events of a job: a JSON list, or server-sent events with `?stream=true` or Accept: text/event-stream."""
    job = service.find_job(job_id)
    if last := request.headers.get("last-event-id"):
        query = EventsQuery.model_validate(query.model_dump() | {"after": last})
    if query.stream or "text/event-stream" in request.headers.get("accept", ""):
        if request.state.head:  # it would last as long as the job
            return Response(media_type="text/event-stream")
        return EventStream(service, request.state.client, job.id, query.after)
    body = await service.store.in_thread(
        functools.partial(events_page, job_id=job.id, after=query.after, limit=query.limit)
    )
    return Response(body, media_type="application/json")


class EventStream(StreamingResponse):
    """The events of a job as server-sent events. Raises RequestError 429 to a client that has STREAMS_PER_CLIENT open."""

    def __init__(self, service: Service, client: str, job_id: str, after: int) -> None:
        stream = event_stream(service.store, service.changes, job_id, after)
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._open, self._client = service.streams, client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (count := self._open[self._client]) >= STREAMS_PER_CLIENT:
            raise refuse("stream", f"{count} event streams of this client", "fewer; close one, or ask without stream",
                         status=429, code="too_many_streams")  # fmt: skip
        self._open[self._client] += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._open[self._client] -= 1


@router.post("/checkpoint", status_code=202, openapi_extra=json_body(CheckpointBody, required=False))
async def checkpoint(request: Request, query: Annotated[WaitQuery, Query()], service: ServiceParts) -> Response:
    """Write the live weights and the optimizer state: 202 with an id, or 200 once it is written (`wait`)."""
    data = await request.body()
    body = await decode_body(data or b"{}", CheckpointBody)
    key = idempotency(request, "/checkpoint", data)
    known = service.store.repeated(*key) if key else None
    checkpoint_id = known or (await uninterrupted(service.scheduler.saver.request("request", idempotency=key))).id
    if body.wait or query.wait:
        await service.wait(lambda: _find(service, checkpoint_id).state != "queued", body.wait_seconds)
    record = _find(service, checkpoint_id)
    return JSONResponse(_checkpoint_view(record), status_code=202 if record.state == "queued" else 200)


@router.post(
    "/checkpoint/{checkpoint_id}/restore", status_code=202, openapi_extra=json_body(CheckpointBody, required=False)
)
async def restore(
    request: Request, checkpoint_id: str, query: Annotated[WaitQuery, Query()], service: ServiceParts
) -> Response:
    """Put a checkpoint's weights and optimizer state back into the served memory: 202, or 200 once that is done (`wait`)."""
    data = await request.body()
    body = await decode_body(data or b"{}", CheckpointBody)
    record = _find(service, checkpoint_id)
    if record.state != "succeeded":
        raise refuse("state", record.state, "a checkpoint that was written", status=409, code="checkpoint_state")
    if record.fallback:
        raise refuse(
            "path", "a guard's snapshot in host memory", "a checkpoint on disk", status=409, code="checkpoint_state"
        )
    key = idempotency(request, f"/checkpoint/{record.id}/restore", data)
    if not (key and service.store.repeated(*key)):
        await uninterrupted(service.scheduler.saver.restore(record, idempotency=key))
    if body.wait or query.wait:
        await service.wait(lambda: not _is_restoring(_find(service, record.id)), body.wait_seconds)
    record = _find(service, record.id)
    return JSONResponse(_checkpoint_view(record), status_code=202 if _is_restoring(record) else 200)


def _is_restoring(record: Checkpoint) -> bool:
    return record.restore is not None and record.restore.state == "queued"


@router.get("/checkpoint/{checkpoint_id}")
async def checkpoint_state(checkpoint_id: str, service: ServiceParts) -> Response:
    """One checkpoint."""
    return JSONResponse(_checkpoint_view(_find(service, checkpoint_id)))


@router.get("/checkpoints")
async def checkpoints(query: Annotated[PageQuery, Query()], service: ServiceParts) -> Response:
    """Checkpoints, newest first."""
    records, more = service.page_of_checkpoints(query)
    return JSONResponse(listing(msgspec.to_builtins(records), more))


@router.get("/health")
async def health(service: ServiceParts) -> Response:
    """200 while this process answers; `trainer` says whether the ranks are connected. Needs no token."""
    return JSONResponse({"status": "ok", "trainer": service.scheduler.link.connected})


def _find(service: Service, checkpoint_id: str) -> Checkpoint:
    """By its id, or by its name."""
    store = service.store
    return found(store.checkpoint(checkpoint_id) or store.checkpoint_named(checkpoint_id), "checkpoint", checkpoint_id)


def _checkpoint_view(record: Checkpoint) -> dict[str, Any]:
    view: dict[str, Any] = msgspec.to_builtins(record)
    return {"object": "train.checkpoint"} | view
