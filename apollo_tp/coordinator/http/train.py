"""The routes of the trainer's own API: /train, its jobs and events, /checkpoint, /health."""

from __future__ import annotations

import asyncio
import math
import mmap
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from apollo_tp.coordinator.http.bodies import decode_body
from apollo_tp.coordinator.http.job_routes import add_job_routes
from apollo_tp.coordinator.http.parameters import (
    EventsQuery,
    PageQuery,
    StrictRoute,
    TrainQuery,
    WaitQuery,
    idempotency,
    json_body,
)
from apollo_tp.coordinator.http.service import Service, ServiceParts, found, listing, page_of
from apollo_tp.coordinator.http.views import event_stream, events_page, job_view
from apollo_tp.coordinator.jobs.evaluation import score as score_samples
from apollo_tp.coordinator.jobs.job import Job, State, new_job, plan_total_steps
from apollo_tp.coordinator.jobs.store import Checkpoint
from apollo_tp.coordinator.samples.intake import spec_of
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.samples.sample_file import write_records
from apollo_tp.coordinator.samples.schema import CheckpointBody, ScoreBody, TrainBody
from apollo_tp.errors import refuse
from apollo_tp.wire.commands import Sample

STREAMS_PER_CLIENT = 64
MAX_DRY_RUN_BYTES = 8 * 2**20
"""The answer of a dry run is several times as large as its body, and is made in memory."""

router = APIRouter(route_class=StrictRoute)


@router.post("/train", status_code=202, openapi_extra=json_body(TrainBody))
async def train(request: Request, query: Annotated[TrainQuery, Query()], service: ServiceParts) -> Response:
    """Queue a job (202), or wait for its end (200); `?dry_run=true` only shows the tokens and their weights."""
    async with service.large_bodies.received(request) as data:
        if query.dry_run:
            return await _dry_run(service, data)
        body, job_id, headers = await _accept(service, request, data)
    return await _answer(service, query, body, job_id, headers)


async def _accept(service: Service, request: Request, data: bytes | mmap.mmap) -> tuple[TrainBody, str, dict[str, str]]:
    """Store the job of a request, unless that was done when the request came the first time. Returns the body, the job's id
    and headers of the answer."""
    key = await asyncio.to_thread(idempotency, request, "/train", data)
    if key and (known := service.store.repeated(*key)):
        return await asyncio.to_thread(decode_body, data, TrainBody), known, {"Idempotent-Replay": "true"}
    service.store.check_room(service.settings.service.max_queued_jobs)
    with service.storing(len(data)):
        body, samples = await asyncio.to_thread(_read, service, data)
        return body, (await _store(service, body, samples, key)).id, {}


async def _answer(
    service: Service, query: TrainQuery, body: TrainBody, job_id: str, headers: dict[str, str]
) -> Response:
    """The job: 200 once it is over, for which this waits if asked to; else 202."""
    if body.wait or query.wait:
        await service.wait(lambda: service.find_job(job_id).terminal, body.wait_seconds)
    job = service.find_job(job_id)
    headers = {"Location": f"/train/jobs/{job.id}"} | headers
    return JSONResponse(job_view(job, service.scheduler), status_code=200 if job.terminal else 202, headers=headers)


def _read(service: Service, data: bytes | mmap.mmap) -> tuple[TrainBody, list[Sample]]:
    body = decode_body(data, TrainBody)
    return body, service.intake(body.truncate).train_samples(body)


async def _store(service: Service, body: TrainBody, samples: list[Sample], key: tuple[str, str, str] | None) -> Job:
    job = new_job("train", spec_of(body), State.queued, service.scheduler.model)
    job.num_samples, job.total_steps = len(samples), plan_total_steps(job.spec, len(samples))
    path = service.store.samples_dir / f"{job.id}.train"
    await asyncio.to_thread(write_records, path, samples)
    try:
        if key and (known := service.store.repeated(*key)):  # the same request may have come twice at once
            path.unlink()
            return service.find_job(known)
        service.store.add_job(job, max_queued=service.settings.service.max_queued_jobs, idempotency=key)
    except BaseException:
        path.unlink()
        raise
    service.scheduler.wake()
    return job


async def _dry_run(service: Service, data: bytes | mmap.mmap) -> Response:
    if len(data) > MAX_DRY_RUN_BYTES:
        raise refuse("body", f"{len(data)} bytes in a dry run", f"at most {MAX_DRY_RUN_BYTES} to be shown", status=413,
                     code="body_too_large")  # fmt: skip
    body, samples = await asyncio.to_thread(_read, service, data)
    shown = await asyncio.to_thread(_shown, service.renderer, body, samples)
    return Response(shown, media_type="application/json")


def _shown(renderer: Renderer | str, body: TrainBody, samples: list[Sample]) -> bytes:
    shown = [
        {"token_ids": sample.token_ids, "weights": sample.weights,
         "tokens": None if isinstance(renderer, str) else renderer.decode(sample.token_ids)} for sample in samples
    ]  # fmt: skip
    answer = {
        "object": "train.dry_run",
        "samples": shown,
        "num_tokens": sum(len(sample.token_ids) for sample in samples),
        "num_loss_tokens": sum(weight > 0 for sample in samples for weight in sample.weights),
        "total_steps": plan_total_steps(spec_of(body), len(samples)),
    }
    return msgspec.json.encode(answer)


@router.post("/train/score", openapi_extra=json_body(ScoreBody))
async def score(request: Request, service: ServiceParts) -> Response:
    """Log-probabilities of samples under the trainer's weights of this moment, for `apollo-tp compare`. Trains nothing."""
    async with service.large_bodies.received(request) as data:
        body = await asyncio.to_thread(decode_body, data, ScoreBody)
        samples = await asyncio.to_thread(service.intake(body.truncate).samples, body.samples)
    scores = await score_samples(samples, service.scheduler.ask)
    listed = [
        {"logprob": logprob if math.isfinite(logprob) else None, "weight": weight, "correct": correct,
         "num_tokens": len(sample.token_ids)}
        for sample, (logprob, weight, correct) in zip(samples, scores, strict=True)
    ]  # fmt: skip
    return JSONResponse(
        {"object": "train.score", "weight_version": service.scheduler.link.weight_version, "data": listed}
    )


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
    return JSONResponse(service.list_jobs(query, job_view))


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
        return EventStream(service, request.state.client, job.id, query.after)
    body = await asyncio.to_thread(events_page, service.store, job.id, query.after, query.limit)
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
    body = decode_body(data or b"{}", CheckpointBody)
    key = idempotency(request, "/checkpoint", data)
    known = service.store.repeated(*key) if key else None
    checkpoint_id = known or service.scheduler.saver.request("request", idempotency=key).id
    if body.wait or query.wait:
        await service.wait(lambda: _find(service, checkpoint_id).state != "queued", body.wait_seconds)
    record = _find(service, checkpoint_id)
    return JSONResponse(_checkpoint_view(record), status_code=202 if record.state == "queued" else 200)


@router.get("/checkpoint/{checkpoint_id}")
async def checkpoint_state(checkpoint_id: str, service: ServiceParts) -> Response:
    """One checkpoint."""
    return JSONResponse(_checkpoint_view(_find(service, checkpoint_id)))


@router.get("/checkpoints")
async def checkpoints(query: Annotated[PageQuery, Query()], service: ServiceParts) -> Response:
    """Checkpoints, newest first."""
    records, more = page_of(service.store.checkpoints(), query)
    return JSONResponse(listing(msgspec.to_builtins(records), more))


@router.get("/health")
async def health(service: ServiceParts) -> Response:
    """200 while this process answers; `trainer` says whether the ranks are connected. Needs no token."""
    return JSONResponse({"status": "ok", "trainer": service.scheduler.link.connected})


def _find(service: Service, checkpoint_id: str) -> Checkpoint:
    return found(service.store.checkpoint(checkpoint_id), "checkpoint", checkpoint_id)


def _checkpoint_view(record: Checkpoint) -> dict[str, Any]:
    view: dict[str, Any] = msgspec.to_builtins(record)
    return {"object": "train.checkpoint"} | view
