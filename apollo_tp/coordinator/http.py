"""The ASGI application: one route table for the coordinator's own port and for requests tunnelled from vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from apollo_tp.coordinator.auth import Access
from apollo_tp.coordinator.edge import Edge, error_response
from apollo_tp.coordinator.train_api import Service, TrainApi
from apollo_tp.errors import ApolloTpError


def routes(service: Service) -> Sequence[BaseRoute]:
    """Every route."""
    return TrainApi(service).routes()


def build_app(service: Service, access: Access) -> ASGIApp:
    """The routes inside the edge."""

    def on_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    app = Starlette(routes=routes(service), exception_handlers={HTTPException: on_error, ApolloTpError: on_error})
    limits = service.settings.service
    # ExceptionMiddleware inside, ours outside: starlette's own handler for 500 would raise again behind the response
    return Edge(app, access, limits.max_body_bytes, limits.max_file_bytes)
