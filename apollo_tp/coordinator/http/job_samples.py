"""The samples of a job as they are trained on: tokens, and which of them are learned."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from apollo_tp.coordinator.http.parameters import SamplesQuery, StrictRoute
from apollo_tp.coordinator.http.service import Service, ServiceParts
from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.samples.sample_file import Pair, read_records
from apollo_tp.wire.commands import Sample, Sampled

router = APIRouter(route_class=StrictRoute)


@router.get("/train/jobs/{job_id}/samples")
async def samples(
    request: Request, job_id: str, query: Annotated[SamplesQuery, Query()], service: ServiceParts
) -> Response:
    """Some of a job's samples as token ids with weights, and as texts of the tokens. A job that is over has none: they are
    removed then; `reason` says so."""
    job = service.find_job(job_id)
    path = service.store.samples_dir / f"{job.id}.train"
    indices = range(query.first, min(query.first + query.limit, job.num_samples))
    data: list[dict[str, Any]] = []
    reason = "samples of a job that is over are removed"
    if job.spec.method == "reinforcement":
        reason = "a reinforcement job makes its samples itself; its events show some of them"
    elif not job.terminal:
        reason = "the job's files are not validated yet"
        with contextlib.suppress(FileNotFoundError):  # not written yet, or the job has ended meanwhile
            data = await service.samples.run(request, lambda _: _shown(service, job, path, indices))
            reason = ""
    answer = {"object": "list", "data": data, "has_more": bool(data) and indices.stop < job.num_samples}
    return Response(msgspec.json.encode(answer | {"reason": reason or None}), media_type="application/json")


def _shown(service: Service, job: Job, path: Path, indices: range) -> list[dict[str, Any]]:
    view = functools.partial(sample_view, service)
    if job.spec.method == "dpo":
        pairs = zip(indices, read_records(path, indices, Pair), strict=True)
        return [
            {"index": index, "side": side} | view(getattr(pair, side))
            for index, pair in pairs
            for side in ("preferred", "rejected")
        ]
    return [
        {"index": index} | view(each) for index, each in zip(indices, read_records(path, indices, Sample), strict=True)
    ]


def sample_view(service: Service, sample: Sample) -> dict[str, Any]:
    """Token ids, weights and texts of the tokens (null if there is no tokenizer) of a sample."""
    renderer = service.renderer
    tokens = None if isinstance(renderer, str) else renderer.decode(sample.token_ids)
    view: dict[str, Any] = {"token_ids": sample.token_ids, "weights": sample.weights, "tokens": tokens}
    return view | ({"sampled": sample.sampled} if sample.sampled != Sampled() else {})
