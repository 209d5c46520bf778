"""score_model: another model gives the number, over any OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import msgspec

from apollo_tp.coordinator.graders.schema import ScoreModel, text_of
from apollo_tp.coordinator.graders.templates import GraderError, fill
from apollo_tp.errors import DECODE_ERRORS

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 3
RETRY_SECONDS = 0.5
SERVER_ERROR, PARSE_ERROR = "model_grader_server_error", "model_grader_parse_error"
_SCHEMA = {
    "type": "object", "properties": {"result": {"type": "number"}}, "required": ["result"], "additionalProperties": False,
}  # fmt: skip
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": _SCHEMA}}


class _Answer(msgspec.Struct):
    class Choice(msgspec.Struct):
        class Said(msgspec.Struct):
            content: str | None = None
            refusal: str | None = None

        message: Said

    class Usage(msgspec.Struct):
        total_tokens: int = 0

    choices: list[Choice]
    usage: Usage | None = None


class _Score(msgspec.Struct):
    result: float


async def judge(grader: ScoreModel, values: dict[str, Any], client: httpx.AsyncClient) -> tuple[float, int]:
    """The score and the tokens that it took. ``client``'s base URL is the API's. Raises GraderError."""
    sampling = grader.sampling_params
    body: dict[str, Any] = {
        "model": grader.model,
        "messages": [{"role": m.role, "content": fill(text_of(m, "content"), values)} for m in grader.input],
        "response_format": RESPONSE_FORMAT,
    }
    if sampling is not None:
        options = msgspec.to_builtins(sampling)
        options["max_completion_tokens"] = options.pop("max_completions_tokens", None)
        body |= {name: value for name, value in options.items() if value is not None}
    answer = await _ask(client, body, grader.model)
    choice = answer.choices[0].message if answer.choices else None
    if choice is None or choice.refusal:
        raise GraderError(f"{grader.model} gave no answer: {choice and choice.refusal}", "model_grader_refusal_error")
    return _number(grader, choice.content or ""), answer.usage.total_tokens if answer.usage else 0


def _number(grader: ScoreModel, content: str) -> float:
    try:
        score = msgspec.json.decode(content, type=_Score).result
    except (*DECODE_ERRORS, UnicodeEncodeError) as error:
        raise GraderError(
            f'{grader.model}: got {content[:80]!r}, expected {{"result": NUMBER}}', PARSE_ERROR
        ) from error
    low, high = grader.range
    if not (math.isfinite(score) and low <= score <= high):
        raise GraderError(
            f"{grader.model}: got the score {score:g}, expected one from {low:g} to {high:g}", PARSE_ERROR
        )
    return score


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], model: str) -> _Answer:
    """The answer, after a few attempts if the server is busy. The client has the deadline of each."""
    import httpx  # costs a tenth of a second of start-up

    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        try:
            answer = await client.post("chat/completions", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"{type(error).__name__} {error}".strip()
            continue
        if answer.status_code == 429 or answer.status_code >= 500:
            problem = f"status {answer.status_code}"
            continue
        if answer.is_error:
            raise GraderError(f"{model}: got status {answer.status_code}: {answer.text[:200]}", SERVER_ERROR)
        try:
            return msgspec.json.decode(answer.content, type=_Answer)
        except DECODE_ERRORS as error:
            raise GraderError(f"{model}: got no chat completion ({error})", SERVER_ERROR) from error
    raise GraderError(f"{model}: got {problem} {ATTEMPTS} times", SERVER_ERROR)
