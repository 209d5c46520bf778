"""The ASGI application: one set of routes for the coordinator's own port and for requests forwarded from vLLM's."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline

from apollo_tp import __version__
from apollo_tp.coordinator.http import metrics, openai_files, openai_jobs, page, train
from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.errors import ERROR_SCHEMA, STATUS, handle_error
from apollo_tp.coordinator.http.middleware import ServiceMiddleware
from apollo_tp.coordinator.http.service import Service
from apollo_tp.coordinator.http.validation import FileValidation
from apollo_tp.coordinator.samples.schema import CheckpointBody, FineTuningBody, ScoreBody, TrainBody

_ERROR = {"description": "Refused", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}


def build_app(service: Service, access: Access, figures: metrics.Metrics, validation: FileValidation) -> FastAPI:
    """All routes inside the middleware. /docs is Swagger UI from the installed package: no other host is asked."""
    app = FastAPIOffline(
        title="apollo_tp",
        version=__version__,
        description="Train the model that a server is serving.",
        redoc_url=None,
        static_url="/docs/assets",
        swagger_ui_parameters={"validatorUrl": None},  # else Swagger UI sends the document to a public validator
        responses={"2XX": {"description": "Done"}, "4XX": _ERROR, "5XX": _ERROR},
        exception_handlers=dict.fromkeys(STATUS, handle_error),
    )
    app.state.service, app.state.metrics, app.state.validation = service, figures, validation
    link = service.scheduler.link
    app.add_middleware(
        ServiceMiddleware,
        access=access,
        limits=service.settings.service,
        weight_version=lambda: link.weight_version,
    )
    for module in (train, openai_files, openai_jobs, metrics, page):
        app.include_router(module.router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document and what it cannot know: the bodies that msgspec decodes, errors, and tokens (see auth.py)."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, schemas = msgspec.json.schema_components(
            (TrainBody, ScoreBody, CheckpointBody, FineTuningBody), ref_template="#/components/schemas/{name}"
        )
        components = document.setdefault("components", {})
        components["schemas"] = components.get("schemas", {}) | schemas | {"Error": ERROR_SCHEMA}
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        app.openapi_schema = document
    return app.openapi_schema
