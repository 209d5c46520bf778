"""The ASGI application: one route table for the coordinator's own port and for requests tunnelled from vLLM's."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.metrics import Metrics
from apollo_tp.coordinator.http.middleware import Edge
from apollo_tp.coordinator.http.openai_files import FilesApi
from apollo_tp.coordinator.http.openai_jobs import FineTuningApi
from apollo_tp.coordinator.http.openapi import openapi_route
from apollo_tp.coordinator.http.page import page_routes
from apollo_tp.coordinator.http.service import Service
from apollo_tp.coordinator.http.train import TrainApi


def build_app(service: Service, access: Access, metrics: Metrics, fine_tuning: FineTuningApi) -> ASGIApp:
    """The routes inside the edge."""
    routes: list[Route] = [
        *TrainApi(service).routes(),
        *FilesApi(service).routes(),
        *fine_tuning.routes(),
        *metrics.routes(),
        *page_routes(service),
    ]
    routes.append(openapi_route(routes))
    app = Starlette(routes=routes)
    # none of starlette's error handlers: theirs for 500 answers in plain text, and raises again behind the response
    app.middleware_stack = app.router
    limits = service.settings.service
    link = service.scheduler.link
    return Edge(app, access, limits.max_body_bytes, limits.max_file_bytes, lambda: link.weight_version)
