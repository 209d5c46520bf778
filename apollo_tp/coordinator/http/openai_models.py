"""/v1/models: the served model, so that a program with one base URL finds the name that its jobs must have."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.http.parameters import StrictRoute
from apollo_tp.coordinator.http.service import Service, ServiceParts, listing
from apollo_tp.coordinator.jobs.rank_link import RanksGoneError
from apollo_tp.errors import refuse

router = APIRouter(prefix="/v1/models", route_class=StrictRoute)


@router.get("")
async def list_models(service: ServiceParts) -> Response:
    """The names of the served model."""
    return JSONResponse(listing([_view(name) for name in _names(service)]))


@router.get("/{model:path}")
async def retrieve(model: str, service: ServiceParts) -> Response:
    """The served model, by one of its names."""
    names = _names(service)
    if model not in names:
        raise refuse("model", repr(model[:80]), f"the served model: {names[0]!r}", status=404, code="model_not_found")
    return JSONResponse(_view(model))


def _names(service: Service) -> list[str]:
    hello = service.scheduler.link.hello
    if hello is None:
        raise RanksGoneError("the trainer has not connected yet, so the name of its model is unknown; try again later")
    return hello.served_model_names or [hello.model_path]


def _view(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "apollo_tp"}
