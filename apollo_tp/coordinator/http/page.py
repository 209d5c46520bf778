"""The page at / (one file from the package: no build step, no other host), and the server's own latency figures for it."""

from __future__ import annotations

import asyncio
import collections
import functools
from importlib import resources
from typing import Any

from fastapi import APIRouter
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import HTMLResponse, JSONResponse, Response

from apollo_tp.coordinator.http.parameters import StrictRoute
from apollo_tp.coordinator.http.service import ServiceParts

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
# vLLM's names, newer ones first; sums and counts over the server's life
_LATENCIES = {
    "inter_token_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "first_token_seconds": ("vllm:time_to_first_token_seconds",),
}
_RUNNING = "vllm:num_requests_running"


router = APIRouter(route_class=StrictRoute)


@functools.cache
def _html() -> str:
    return resources.files("apollo_tp.coordinator.http").joinpath("page.html").read_text(encoding="utf-8")


@router.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """The page."""
    return HTMLResponse(_html(), headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})


@router.get("/train/server")
async def server(service: ServiceParts) -> Response:
    """Latency of the model server, from its own metrics: sums and counts since it started."""
    url = service.settings.service.server_url
    if url is None:
        return JSONResponse({"reachable": False, "reason": "service.server_url is not set"})
    try:
        text = await _fetch(f"{url.rstrip('/')}/metrics")
        figures = await asyncio.to_thread(parse_server_metrics, text)  # some thousand lines
    except (OSError, TimeoutError, ValueError) as error:
        return JSONResponse({"reachable": False, "reason": f"{type(error).__name__}: {error}"})
    return JSONResponse({"reachable": True} | figures)


async def _fetch(url: str) -> str:
    import httpx  # costs a tenth of a second of start-up, and most coordinators never need it

    async with asyncio.timeout(3.0), httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        try:
            answer = await client.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(str(error) or type(error).__name__) from error
    return answer.text


def parse_server_metrics(text: str) -> dict[str, Any]:
    """Sums, counts and running requests from Prometheus text, summed over labels. Raises ValueError for other text."""
    totals: dict[str, float] = collections.defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] += sample.value
    found: dict[str, Any] = {"requests_running": totals.get(_RUNNING)}
    for key, names in _LATENCIES.items():
        for name in names:
            if f"{name}_count" in totals:
                found[key] = {"sum": totals[f"{name}_sum"], "count": totals[f"{name}_count"]}
                break
    return found
