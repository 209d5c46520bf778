"""The ASGI application: one set of routes for the coordinator's own port and for requests forwarded from vLLM's."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from apollo_tp import __version__
from apollo_tp.coordinator.http import (
    captures,
    job_samples,
    latency,
    metrics,
    openai_files,
    openai_graders,
    openai_jobs,
    openai_models,
    openai_uploads,
    page,
    train,
)
from apollo_tp.coordinator.http.auth import Access
from apollo_tp.coordinator.http.errors import STATUS, ErrorBody, handle_error
from apollo_tp.coordinator.http.middleware import ServiceMiddleware
from apollo_tp.coordinator.http.openai_bodies import CompleteBody, FineTuningBody, GraderBody, GraderRunBody, UploadBody
from apollo_tp.coordinator.http.parameters import SCHEMA_REF
from apollo_tp.coordinator.http.service import Service
from apollo_tp.coordinator.http.validation import FileValidation
from apollo_tp.coordinator.samples.schema import CheckpointBody, ScoreBody, TrainBody


def build_app(service: Service, access: Access, figures: metrics.Metrics, validation: FileValidation) -> FastAPI:
    """All routes inside the middleware. /docs is Swagger UI from the installed package: no other host is asked."""
    app = FastAPIOffline(
        title="apollo_tp",
        version=__version__,
        description="Train the model that a server is serving.",
        redoc_url=None,
        redirect_slashes=False,  # a redirect's Location would repeat whatever Host the client sent
        static_url="/docs/assets",
        swagger_ui_parameters={"validatorUrl": None},  # otherwise Swagger UI sends the document to a public validator
        responses={"2XX": {"description": "Done"}, "4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        exception_handlers=dict.fromkeys(STATUS, handle_error),
    )
    app.state.service, app.state.metrics, app.state.validation = service, figures, validation
    app.state.uploads = openai_uploads.Uploads(service.store)
    link, limits = service.scheduler.link, service.settings.service
    app.add_middleware(ServiceMiddleware, access=access, limits=limits, weight_version=lambda: link.weight_version)
    routes = (
        train, job_samples, openai_files, openai_uploads, openai_jobs, openai_graders, openai_models, captures, metrics,
        latency, page,
    )  # fmt: skip
    for module in routes:
        app.include_router(module.router)
    app.mount(page.PREFIX, page.files())
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with what it cannot know: the bodies that msgspec decodes, and tokens (see auth.py)."""
    if not app.openapi_schema:
        document = FastAPI.openapi(app)
        document["security"] = [{"token": []}]
        components = document["components"]
        bodies = (
            TrainBody, ScoreBody, CheckpointBody, FineTuningBody, UploadBody, CompleteBody, GraderBody, GraderRunBody,
            captures.FeedbackBody,
        )  # fmt: skip
        components["schemas"] |= msgspec.json.schema_components(bodies, ref_template=SCHEMA_REF)[1]
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema
