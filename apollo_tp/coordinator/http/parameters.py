"""What requests may carry: query parameters, Idempotency-Key and JSON bodies, and how OpenAPI describes them.

A query parameter that a route does not declare is refused, as an unknown field of a body is: a misspelt ``dry_run`` must
not train.

JSON bodies are decoded by msgspec and not declared as FastAPI models. FastAPI parses and validates on the event loop, where
``json.loads`` and pydantic take 0.6 to 2.2 s for 26 to 29 MB of token ids; no other client is answered meanwhile. msgspec
takes 0.2 to 0.5 s for the same bodies, in a worker thread, and the lines of uploaded files are of the same types.
"""

from __future__ import annotations

import hashlib
import inspect
import mmap
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import msgspec
from fastapi import Depends, Query
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from starlette.requests import Request

from apollo_tp.errors import RequestError, refuse

MAX_PARAMETERS = 64
SCHEMA_REF = "#/components/schemas/{name}"


def _or(default: Any) -> BeforeValidator:
    """An empty value stands for the default: httpx sends None as one. Not for flags: ``?dry_run=`` must not train."""
    return BeforeValidator(lambda value: default if value == "" else value)


PURPOSE = "fine-tune"
"""Of the files that can be uploaded."""
Purpose = Literal[
    "fine-tune",
    "fine-tune-results",
    "assistants",
    "assistants_output",
    "batch",
    "batch_output",
    "vision",
    "user_data",
    "evals",
]
"""Purposes that OpenAI knows: lists are filtered by them, whether there are such files here or not."""


class NoQuery(BaseModel, extra="forbid"):
    """No query parameters; the base of the models that have some. Raises RequestError, which names the parameter."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise _refusal(error, list(cls.model_fields)) from error


class WaitQuery(NoQuery):
    """Answer at once, or when the work is over."""

    wait: bool = False


class TrainQuery(NoQuery):
    """Query of POST /train."""

    dry_run: bool = False
    wait: bool = False


class EventsQuery(NoQuery):
    """Query of GET /train/jobs/{job_id}/events."""

    stream: bool = False
    after: Annotated[int, Field(ge=0, le=2**62), _or(0)] = 0
    limit: Annotated[int, Field(ge=1, le=10_000), _or(1000)] = 1000


class SamplesQuery(NoQuery):
    """Query of GET /train/jobs/{job_id}/samples: which ones, counted from 0. Their tokens are decoded one by one, and are
    several times as large as their ids."""

    first: Annotated[int, Field(ge=0, le=2**31), _or(0)] = 0
    limit: Annotated[int, Field(ge=1, le=8), _or(1)] = 1


class LatencyQuery(NoQuery):
    """Query of GET /train/latency."""

    after: Annotated[float, Field(ge=0, le=1e12), _or(0.0)] = 0.0


class PageQuery(NoQuery):
    """One page of a list: ``after`` is the last id of the page before."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100), _or(20)] = 20


class FilesQuery(PageQuery):
    """Query of GET /v1/files."""

    limit: Annotated[int, Field(ge=1, le=10_000), _or(10_000)] = 10_000
    purpose: Annotated[Purpose | None, _or(None)] = None
    order: Annotated[Literal["desc", "asc"], _or("desc")] = "desc"


class PermissionsQuery(PageQuery):
    """Query of OpenAI's checkpoint permissions, which are not offered."""

    order: str | None = None
    project_id: str | None = None


class FineTuningJobsQuery(PageQuery):
    """Query of GET /v1/fine_tuning/jobs. ``metadata`` comes as metadata[KEY]=VALUE; None (``metadata=null``) stands for jobs
    without any."""

    metadata: Annotated[dict[str, str] | None, Query(include_in_schema=False)] = {}

    @model_validator(mode="before")
    @classmethod
    def _collect_metadata(cls, data: dict[str, Any]) -> dict[str, Any]:
        names = [
            name for name, value in data.items() if name.partition("[")[0] == "metadata" and isinstance(value, str)
        ]
        if names == ["metadata"] and data["metadata"] in ("null", ""):
            return data | {"metadata": None if data["metadata"] else {}}
        for name in names:
            if not (name.startswith("metadata[") and name.endswith("]")):
                raise refuse("metadata", repr(name[:80]), "metadata[KEY]=VALUE")
        return {name: value for name, value in data.items() if name not in names} | {
            "metadata": {name[9:-1]: data[name] for name in names}
        }


METADATA_SCHEMA = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}
"""The OpenAPI parameter of FineTuningJobsQuery.metadata: FastAPI has no parameters of style deepObject."""


def _refusal(error: ValidationError, known: list[str]) -> RequestError:
    """The first problem that pydantic found in a query whose parameters are ``known``."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])[:80]
    if first["type"] == "extra_forbidden":
        return refuse(name, "an unknown query parameter", f"one of {', '.join(known)}" if known else "none")
    expected = first["msg"].removeprefix("Input should be ").partition(", unable")[0]
    return refuse(name, repr(str(first["input"])[:40]), expected)


async def _no_query(query: Annotated[NoQuery, Query()]) -> None:
    """Refuse every query parameter."""


_NO_QUERY = Depends(_no_query)


async def _given_once(request: Request) -> None:
    """Refuse a query parameter that is given twice: FastAPI takes the last one."""
    names = [name for name, _ in request.query_params.multi_items()]
    if twice := next((name for index, name in enumerate(names[:MAX_PARAMETERS]) if name in names[:index]), None):
        raise refuse(twice[:80], "this query parameter twice", "it once")
    if len(names) > MAX_PARAMETERS:
        raise refuse("query", f"{len(names)} parameters", f"at most {MAX_PARAMETERS}")


_GIVEN_ONCE = Depends(_given_once)


class StrictRoute(APIRoute):
    """A route that refuses query parameters also if its endpoint has no ``query`` argument (a model from this module), and
    parameters that come twice."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        dependencies = list(options.pop("dependencies", None) or [])
        if _GIVEN_ONCE not in dependencies:
            dependencies.insert(0, _GIVEN_ONCE)
        if "query" not in inspect.signature(endpoint).parameters and _NO_QUERY not in dependencies:
            dependencies.append(_NO_QUERY)
        super().__init__(path, endpoint, dependencies=dependencies, **options)


def json_body(type: type[msgspec.Struct], *, required: bool = True) -> dict[str, Any]:
    """The part of an OpenAPI operation that names its JSON body; app.py adds the schema of ``type`` to the document."""
    schema = {"$ref": SCHEMA_REF.format(name=type.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def idempotency(request: Request, route: str, data: bytes | mmap.mmap) -> tuple[str, str, str] | None:
    """Route, Idempotency-Key and digest of a request that carries such a key."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1:
        raise refuse("Idempotency-Key", f"{len(keys)} keys", "one")
    key = keys[0]
    if not 1 <= len(key) <= 255:
        raise refuse("Idempotency-Key", f"{len(key)} characters", "1 to 255")
    return route, key, hashlib.sha256(data).hexdigest()
