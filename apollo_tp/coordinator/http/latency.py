"""Routes of the model server's latency, now and over time."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.http.parameters import LatencyQuery, StrictRoute
from apollo_tp.coordinator.http.server_metrics import server_figures
from apollo_tp.coordinator.http.service import ServiceParts

router = APIRouter(route_class=StrictRoute)


@router.get("/train/latency")
async def latency(query: Annotated[LatencyQuery, Query()], service: ServiceParts) -> Response:
    """Latency of the model server over time: sums and counts of the intervals that ended later than `after` (Unix seconds),
    oldest first; and of all intervals with and without training."""
    history = service.latency
    answer = {
        "object": "train.latency",
        "server_url": history.url,
        "reachable": not history.reason,
        "reason": history.reason or None,
        "with_training": history.means(True),
        "without_training": history.means(False),
        "data": [point for point in history.points if point.time > query.after],
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")


@router.get("/train/server")
async def server(service: ServiceParts) -> Response:
    """Latency of the model server, from its own metrics: sums and counts since it started."""
    if service.latency.url is None:
        return JSONResponse({"reachable": False, "reason": service.latency.reason})
    try:
        figures: dict[str, Any] = msgspec.to_builtins(await server_figures(service.latency.url))
    except (OSError, TimeoutError, ValueError) as error:
        return JSONResponse({"reachable": False, "reason": f"{type(error).__name__}: {error}"})
    return JSONResponse({"reachable": True} | {name: value for name, value in figures.items() if value is not None})
