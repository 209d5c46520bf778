"""The routes of the trainer's own surface: /train, its jobs and events, /checkpoint, /health."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from apollo_tp.coordinator.http.service import Service, flag, idempotency, page, page_of, whole
from apollo_tp.coordinator.http.views import event_stream, event_view, job_view, status_view
from apollo_tp.coordinator.jobs.evaluation import score
from apollo_tp.coordinator.jobs.job import Job, State, new_job, plan_total_steps
from apollo_tp.coordinator.jobs.store import Checkpoint
from apollo_tp.coordinator.samples.intake import spec_of
from apollo_tp.coordinator.samples.sample_file import write_records
from apollo_tp.coordinator.samples.schema import CheckpointBody, ScoreBody, TrainBody, decode
from apollo_tp.errors import RequestError
from apollo_tp.wire.commands import Sample

STATUS_SECONDS = 0.2  # heartbeats are no change


class TrainApi:
    """Handlers of /train and /checkpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._status: tuple[int, float, bytes] = (-1, 0.0, b"")

    def routes(self) -> list[Route]:
        """The route table of this surface."""
        return [
            Route("/train", self.train, methods=["POST"]),
            Route("/train/score", self.score, methods=["POST"]),
            Route("/train/status", self.status, methods=["GET"]),
            Route("/train/layout", self.layout, methods=["GET"]),
            Route("/train/jobs", self.jobs, methods=["GET"]),
            Route("/train/jobs/{job_id}", self.job, methods=["GET"]),
            Route("/train/jobs/{job_id}/events", self.events, methods=["GET"]),
            *(Route(f"/train/jobs/{{job_id}}/{action}", self._action(action), methods=["POST"])
              for action in ("cancel", "pause", "resume")),
            Route("/checkpoint", self.checkpoint, methods=["POST"]),
            Route("/checkpoint/{checkpoint_id}", self.checkpoint_state, methods=["GET"]),
            Route("/checkpoints", self.checkpoints, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]  # fmt: skip

    async def train(self, request: Request) -> Response:
        """Queue a job (202), or wait for its end (200); ``?dry_run=true`` only shows the tokens and their weights."""
        service, data = self._service, await request.body()
        dry_run = flag(request, "dry_run")
        key = idempotency(request, "/train", data)
        if not dry_run and key and (known := service.store.repeated(*key)):
            return await self._answer(request, decode(data, TrainBody), known, {"Idempotent-Replay": "true"})
        if not dry_run:
            service.store.check_room(service.settings.service.max_queued_jobs)
            service.check_disk(len(data))
        body, samples = await asyncio.to_thread(self._read, data)
        if dry_run:
            shown = await asyncio.to_thread(self._dry_run, body, samples)
            return Response(shown, media_type="application/json")
        job = await self._store(body, samples, key)
        return await self._answer(request, body, job.id)

    async def _answer(
        self, request: Request, body: TrainBody, job_id: str, headers: dict[str, str] | None = None
    ) -> Response:
        """The job: 200 once it is over, for which this waits if asked to; else 202."""
        service = self._service
        if body.wait or flag(request, "wait"):
            await service.wait(lambda: service.find(job_id).terminal, body.wait_seconds)
        job = service.find(job_id)
        return self._accepted(job, 200 if job.terminal else 202, headers)

    def _read(self, data: bytes) -> tuple[TrainBody, list[Sample]]:
        body = decode(data, TrainBody)
        return body, self._service.intake(body.truncate).train_samples(body)

    async def _store(self, body: TrainBody, samples: list[Sample], key: tuple[str, str, str] | None) -> Job:
        service = self._service
        job = new_job("train", spec_of(body), State.queued, service.scheduler.model)
        job.num_samples, job.total_steps = len(samples), plan_total_steps(job.spec, len(samples))
        path = service.store.samples_dir / f"{job.id}.train"
        await asyncio.to_thread(write_records, path, samples)
        try:
            if key and (known := service.store.repeated(*key)):  # the same request may have come twice at once
                path.unlink()
                return service.find(known)
            service.store.add_job(job, max_queued=service.settings.service.max_queued_jobs, idempotency=key)
        except RequestError:
            path.unlink()
            raise
        service.scheduler.wake()
        return job

    def _dry_run(self, body: TrainBody, samples: list[Sample]) -> bytes:
        renderer = self._service.renderer
        spec = spec_of(body)
        shown = [
            {"token_ids": sample.token_ids, "weights": sample.weights,
             "tokens": None if isinstance(renderer, str) else renderer.decode(sample.token_ids)} for sample in samples
        ]  # fmt: skip
        answer = {
            "object": "train.dry_run",
            "samples": shown,
            "num_tokens": sum(len(sample.token_ids) for sample in samples),
            "num_loss_tokens": sum(weight > 0 for sample in samples for weight in sample.weights),
            "total_steps": plan_total_steps(spec, len(samples)),
        }
        return msgspec.json.encode(answer)

    def _accepted(self, job: Job, status: int, headers: dict[str, str] | None = None) -> Response:
        headers = {"Location": f"/train/jobs/{job.id}"} | (headers or {})
        return JSONResponse(job_view(job, self._service.scheduler), status_code=status, headers=headers)

    async def score(self, request: Request) -> Response:
        """What the trainer makes of samples under the weights of this moment. Trains nothing. For `apollo-tp compare`."""
        body = decode(await request.body(), ScoreBody)
        samples = await asyncio.to_thread(self._service.intake(body.truncate).samples, body.samples)
        scores = await score(samples, self._service.scheduler.ask)
        data = [
            {"logprob": logprob if math.isfinite(logprob) else None, "weight": weight, "correct": correct,
             "num_tokens": len(sample.token_ids)}
            for sample, (logprob, weight, correct) in zip(samples, scores, strict=True)
        ]  # fmt: skip
        version = self._service.scheduler.link.weight_version
        return JSONResponse({"object": "train.score", "weight_version": version, "data": data})

    async def status(self, request: Request) -> Response:
        """What runs, waits and is done; the last losses; the trainer."""
        version, made, body = self._status
        now = time.monotonic()
        # made once per change, not once per client: 50 polling clients cost as much as one
        if version != self._service.changes.version or now - made > STATUS_SECONDS:
            view = status_view(self._service.scheduler, self._service.store)
            body = msgspec.json.encode(view)
            self._status = (self._service.changes.version, now, body)
        return Response(body, media_type="application/json")

    async def layout(self, request: Request) -> Response:
        """Which part of which checkpoint tensor lies on which rank."""
        hello = self._service.scheduler.link.hello
        return JSONResponse({"object": "list", "data": hello.layout if hello else []})

    async def jobs(self, request: Request) -> Response:
        """Newest first; ``after`` is the last id of the page before, ``limit`` up to 100."""
        after, limit = page_of(request)
        jobs, more = self._service.store.page_of_jobs(after=after, limit=limit)
        live = [self._service.find(job.id) for job in jobs]
        data = [job_view(job, self._service.scheduler) for job in live]
        return JSONResponse({"object": "list", "data": data, "has_more": more})

    async def job(self, request: Request) -> Response:
        """One job."""
        job = self._service.find(request.path_params["job_id"])
        return JSONResponse(job_view(job, self._service.scheduler))

    async def events(self, request: Request) -> Response:
        """Events of a job: a JSON list, or server-sent events with ``?stream=true`` or Accept: text/event-stream."""
        job = self._service.find(request.path_params["job_id"])
        after = whole(request.headers.get("last-event-id") or request.query_params.get("after") or "0", "after")
        if flag(request, "stream") or "text/event-stream" in request.headers.get("accept", ""):
            stream = event_stream(self._service.store, self._service.changes, job.id, after)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        limit = whole(request.query_params.get("limit") or "1000", "limit", 1, 10_000)
        events = self._service.store.events(job.id, after=after, limit=limit + 1)
        data = [event_view(event) for event in events[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(events) > limit})

    def _action(self, action: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            job = self._service.act(self._service.find(request.path_params["job_id"]), action)
            return JSONResponse(job_view(job, self._service.scheduler))

        handler.__name__ = action
        handler.__doc__ = f"{action.capitalize()} a job; a running one at its next step."
        return handler

    async def checkpoint(self, request: Request) -> Response:
        """Write the live weights and the optimizer state: 202 with an id, or 200 once it is written (``wait``)."""
        service, data = self._service, await request.body()
        body = decode(data or b"{}", CheckpointBody)
        key = idempotency(request, "/checkpoint", data)
        known = service.store.repeated(*key) if key else None
        identity = known or service.scheduler.saver.request("request", idempotency=key).id
        if body.wait or flag(request, "wait"):
            await service.wait(lambda: self._checkpoint(identity).state != "queued", body.wait_seconds)
        checkpoint = self._checkpoint(identity)
        return _checkpoint_response(checkpoint, 202 if checkpoint.state == "queued" else 200)

    def _checkpoint(self, checkpoint_id: str) -> Checkpoint:
        checkpoint = self._service.store.checkpoint(checkpoint_id)
        if checkpoint is None:
            raise RequestError(f"got checkpoint {checkpoint_id[:64]!r}, expected the id of one", field="checkpoint_id",
                               got=checkpoint_id[:64], expected="the id of a checkpoint", status=404,
                               code="no_such_checkpoint")  # fmt: skip
        return checkpoint

    async def checkpoint_state(self, request: Request) -> Response:
        """One checkpoint."""
        return _checkpoint_response(self._checkpoint(request.path_params["checkpoint_id"]), 200)

    async def checkpoints(self, request: Request) -> Response:
        """Checkpoints, newest first."""
        after, limit = page_of(request)
        found, more = page(self._service.store.checkpoints(), after, limit)
        return JSONResponse({"object": "list", "data": msgspec.to_builtins(found), "has_more": more})

    async def health(self, request: Request) -> Response:
        """200 while this process answers; ``trainer`` says whether the ranks are there. Needs no token."""
        return JSONResponse({"status": "ok", "trainer": self._service.scheduler.link.connected})


def _checkpoint_response(checkpoint: Checkpoint, status: int) -> Response:
    return JSONResponse({"object": "train.checkpoint"} | msgspec.to_builtins(checkpoint), status_code=status)
