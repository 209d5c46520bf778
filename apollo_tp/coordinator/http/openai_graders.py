"""OpenAI's routes for graders alone: check one, and try it on a completion."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.graders.grading import Grade, offered, open_grading
from apollo_tp.coordinator.graders.schema import Grader, Multi, ScoreModel, read_grader, singles
from apollo_tp.coordinator.http.bodies import decode_body
from apollo_tp.coordinator.http.openai_bodies import GraderBody, GraderRunBody
from apollo_tp.coordinator.http.parameters import StrictRoute, json_body
from apollo_tp.coordinator.http.service import ServiceParts
from apollo_tp.coordinator.http.work import while_connected

GRADERS = "/v1/fine_tuning/alpha/graders"
ERRORS = (
    "formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error",
    "model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error",
    "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
)  # fmt: skip
DETAILED = ("model_grader_server_error", "python_grader_runtime_error")

router = APIRouter(route_class=StrictRoute)


@router.post(f"{GRADERS}/validate", openapi_extra=json_body(GraderBody))
async def validate(request: Request, service: ServiceParts) -> Response:
    """Check a grader."""
    body = await decode_body(await request.body(), GraderBody)
    return JSONResponse({"grader": msgspec.to_builtins(read_grader(body.grader, offered(service.settings.rl)))})


@router.post(f"{GRADERS}/run", openapi_extra=json_body(GraderRunBody))
async def run(request: Request, service: ServiceParts) -> Response:
    """Grade a completion."""
    body = await decode_body(await request.body(), GraderRunBody)
    grader = read_grader(body.grader, offered(service.settings.rl))
    began = time.monotonic()
    async with open_grading(service.settings.rl) as grading:
        grade = await while_connected(request, grading.grade(grader, body.item or {}, body.model_sample))
    return JSONResponse(_run_view(grader, grade, time.monotonic() - began))


def _run_view(grader: Grader, grade: Grade, seconds: float) -> dict[str, Any]:
    """A GraderRunResponse. OpenAI's type has a reward also where there is none: then a flag among ``errors`` says so."""
    models = [each.model for each in singles(grader).values() if isinstance(each, ScoreModel)]
    kind = msgspec.to_builtins(grader)["type"]
    errors: dict[str, Any] = {name: name == grade.kind for name in ERRORS}
    for name in DETAILED:
        errors[f"{name}_details"] = grade.error if name == grade.kind else None
    errors["python_grader_server_error_type"] = grade.error if grade.kind == "python_grader_server_error" else None
    return {
        "reward": 0.0 if grade.reward is None else grade.reward,
        "sub_rewards": grade.scores if isinstance(grader, Multi) else {},
        "model_grader_token_usage_per_model": grade.tokens,
        "metadata": {
            "name": grader.name, "type": kind, "execution_time": seconds, "scores": grade.scores, "errors": errors,
            "sampled_model_name": models[0] if models else None, "token_usage": sum(grade.tokens.values()) or None,
            "message": grade.error or None,
        },
    }  # fmt: skip
