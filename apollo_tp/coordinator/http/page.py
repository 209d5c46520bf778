"""The page at / (one file from the package: no build step, no other host), and the server's own latency figures for it."""

from __future__ import annotations

import asyncio
import re
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from apollo_tp.coordinator.http.service import Service

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
# vLLM's names, newer ones first; sums and counts over the server's life
_LATENCIES = {
    "inter_token_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "first_token_seconds": ("vllm:time_to_first_token_seconds",),
}
_RUNNING = "vllm:num_requests_running"
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:]+)(?:\{[^}]*\})? (?P<value>[0-9.eE+-]+)$", re.MULTILINE)


def page_routes(service: Service) -> list[Route]:
    """GET / and GET /train/server."""
    html = resources.files("apollo_tp.coordinator.http").joinpath("page.html").read_text(encoding="utf-8")

    async def page(request: Request) -> Response:
        """The page."""
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})

    async def server(request: Request) -> Response:
        """Latency of the model server, from its own metrics: sums and counts since it started."""
        url = service.settings.service.server_url
        if url is None:
            return JSONResponse({"reachable": False, "reason": "service.server_url is not set"})
        try:
            text = await _fetch(f"{url.rstrip('/')}/metrics")
        except (OSError, TimeoutError, ValueError) as error:
            return JSONResponse({"reachable": False, "reason": f"{type(error).__name__}: {error}"})
        return JSONResponse({"reachable": True} | parse_server_metrics(text))

    return [Route("/", page, methods=["GET"]), Route("/train/server", server, methods=["GET"])]


async def _fetch(url: str) -> str:
    import httpx  # costs a tenth of a second of start-up, and most coordinators never need it

    async with asyncio.timeout(3.0), httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        try:
            answer = await client.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(str(error) or type(error).__name__) from error
    return answer.text


def parse_server_metrics(text: str) -> dict[str, Any]:
    """Sums, counts and running requests from Prometheus text, summed over labels."""
    totals: dict[str, float] = {}
    for match in _LINE.finditer(text):
        totals[match["name"]] = totals.get(match["name"], 0.0) + float(match["value"])
    found: dict[str, Any] = {"requests_running": totals.get(_RUNNING)}
    for key, names in _LATENCIES.items():
        for name in names:
            if f"{name}_count" in totals:
                found[key] = {"sum": totals[f"{name}_sum"], "count": totals[f"{name}_count"]}
                break
    return found
