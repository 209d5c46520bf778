"""The ASGI application: one route table for the coordinator's own port and for requests tunnelled from vLLM's."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from apollo_tp.coordinator.auth import Access
from apollo_tp.coordinator.edge import Edge, error_response
from apollo_tp.coordinator.metrics import Metrics
from apollo_tp.coordinator.openai_files import FilesApi
from apollo_tp.coordinator.openai_jobs import FineTuningApi
from apollo_tp.coordinator.openapi import openapi_route
from apollo_tp.coordinator.page import page_routes
from apollo_tp.coordinator.service import Service
from apollo_tp.coordinator.train_api import TrainApi
from apollo_tp.errors import ApolloTpError


def build_app(service: Service, access: Access, metrics: Metrics, fine_tuning: FineTuningApi) -> ASGIApp:
    """The routes inside the edge."""

    def on_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    routes: list[Route] = [
        *TrainApi(service).routes(),
        *FilesApi(service).routes(),
        *fine_tuning.routes(),
        *metrics.routes(),
        *page_routes(service),
    ]
    routes.append(openapi_route(routes))
    app = Starlette(routes=routes, exception_handlers={HTTPException: on_error, ApolloTpError: on_error})
    limits = service.settings.service
    # ExceptionMiddleware inside, ours outside: starlette's own handler for 500 would raise again behind the response
    link = service.scheduler.link
    return Edge(app, access, limits.max_body_bytes, limits.max_file_bytes, lambda: link.weight_version)
