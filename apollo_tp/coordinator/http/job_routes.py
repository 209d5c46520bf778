"""The routes of one job that the /train and the OpenAI API have in common: read it, and cancel, pause or resume it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.http.service import ServiceParts
from apollo_tp.coordinator.http.work import uninterrupted
from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.coordinator.jobs.scheduler import Scheduler

ACTIONS = ("cancel", "pause", "resume")


def add_job_routes(router: APIRouter, path: str, view: Callable[[Job, Scheduler], dict[str, Any]]) -> None:
    """Add GET ``path``/{job_id} and POST ``path``/{job_id}/ cancel, pause and resume, which answer with ``view(job)``."""

    async def retrieve(job_id: str, service: ServiceParts) -> Response:
        return JSONResponse(view(service.find_job(job_id), service.scheduler))

    router.add_api_route(f"{path}/{{job_id}}", retrieve, methods=["GET"], summary="One job.")
    for action in ACTIONS:
        summary = f"{action.capitalize()} a job; a running one at its next step."
        router.add_api_route(f"{path}/{{job_id}}/{action}", _handler(action, view), methods=["POST"], summary=summary)


def _handler(action: str, view: Callable[[Job, Scheduler], dict[str, Any]]) -> Callable[..., Any]:
    async def act(job_id: str, service: ServiceParts) -> Response:
        job = await uninterrupted(service.act(job_id, action))
        return JSONResponse(view(job, service.scheduler))

    return act
