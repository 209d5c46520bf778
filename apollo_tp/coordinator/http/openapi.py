"""/openapi.json, built from the route table and the request structs: it cannot say anything that the code does not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from apollo_tp import __version__
from apollo_tp.coordinator.samples.schema import CheckpointBody, FineTuningBody, ScoreBody, TrainBody
from apollo_tp.errors import refuse

_BODIES: dict[tuple[str, str], type[msgspec.Struct]] = {
    ("POST", "/train"): TrainBody,
    ("POST", "/train/score"): ScoreBody,
    ("POST", "/checkpoint"): CheckpointBody,
    ("POST", "/v1/fine_tuning/jobs"): FineTuningBody,
}
_PAGED = ("/train/jobs", "/checkpoints", "/v1/files", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}/events",
          "/v1/fine_tuning/jobs/{job_id}/checkpoints")  # fmt: skip
_BOOLEAN = {"type": "boolean", "default": False}
_QUERY: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/train"): {"dry_run": _BOOLEAN, "wait": _BOOLEAN},
    ("POST", "/checkpoint"): {"wait": _BOOLEAN},
    ("GET", "/train/jobs/{job_id}/events"): {
        "stream": _BOOLEAN,
        "after": {"type": "integer", "minimum": 0},
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
    },
    **{
        ("GET", path): {"after": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": 100}}
        for path in _PAGED
    },
}
_QUERY["GET", "/v1/files"] |= {
    "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
    "purpose": {"type": "string", "enum": ["fine-tune"]},
    "order": {"type": "string", "enum": ["desc", "asc"]},
}
_QUERY["GET", "/v1/fine_tuning/jobs"]["metadata"] = {"type": "object", "additionalProperties": {"type": "string"}}
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["fine-tune"]},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                name: {"type": ["string", "null"]}
                for name in ("message", "type", "param", "code", "field", "got", "expected", "id")
            },
        }
    },
}
_REF = "#/components/schemas/{name}"


def check_query(scope: Scope, routes: Iterable[BaseRoute]) -> None:
    """Raise RequestError for a query parameter that the route of this request does not have: a misspelt ``dry_run`` must not
    train. A path or method without a route is left to the router."""
    names = QueryParams(scope["query_string"]).keys()
    route = next((route for route in routes if route.matches(scope)[0] is Match.FULL), None) if names else None
    if not isinstance(route, Route):
        return
    known = _QUERY.get(("GET" if scope["method"] == "HEAD" else scope["method"], route.path), {})
    for name in names:
        base = name.partition("[")[0]
        if name not in known and known.get(base, {}).get("type") != "object":
            raise refuse(name[:80], "an unknown query parameter", f"one of {', '.join(known)}" if known else "none")


def openapi_route(routes: Iterable[Route]) -> Route:
    """GET /openapi.json for these routes."""
    document = build(routes)

    async def openapi(request: Request) -> Response:
        """This document."""
        return JSONResponse(document)

    return Route("/openapi.json", openapi, methods=["GET"])


def build(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    schemas, components = msgspec.json.schema_components(_BODIES.values(), ref_template=_REF)
    bodies = dict(zip(_BODIES, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation = _operation(method, route, bodies.get((method, route.path)))
            paths.setdefault(route.path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "apollo_tp",
            "version": __version__,
            "description": "Train the model that a server is serving.",
        },
        "paths": paths,
        "components": {
            "schemas": components | {"Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _operation(method: str, route: Route, body: dict[str, Any] | None) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)\}", route.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    query = _QUERY.get((method, route.path), {})
    parameters += [
        {"name": name, "in": "query", "schema": schema}
        | ({"style": "deepObject"} if schema["type"] == "object" else {})
        for name, schema in query.items()
    ]
    error = {"description": "Refused", "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}}
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{route.path}").strip("_"),
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0],
        "parameters": parameters,
        "responses": {"2XX": {"description": "Done"}, "4XX": error, "5XX": error},
    }
    if body is not None:
        operation["requestBody"] = {
            "required": route.path != "/checkpoint",
            "content": {"application/json": {"schema": body}},
        }
    if (method, route.path) == ("POST", "/v1/files"):
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    return operation
