"""score_model: another model gives the number, over any OpenAI-compatible API."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from apollo_tp.coordinator.graders.clients import NoAnswerError, ask
from apollo_tp.coordinator.graders.schema import ScoreModel, text_of
from apollo_tp.coordinator.graders.templates import GraderError, fill
from apollo_tp.errors import DECODE_ERRORS

if TYPE_CHECKING:
    import httpx

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
    try:
        answer = await ask(client, "chat/completions", body, _Answer)
    except NoAnswerError as error:
        raise GraderError(f"{grader.model}: {error}", SERVER_ERROR) from error
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
