"""Stored completions, as OpenAI's API lists them, and POST /feedback on them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from msgspec import Meta
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apollo_tp.coordinator.captures.store import Captures, Stored
from apollo_tp.coordinator.http.bodies import decode_body
from apollo_tp.coordinator.http.parameters import NoQuery, StrictRoute, json_body
from apollo_tp.coordinator.http.service import Service, ServiceParts, listing, unknown_cursor
from apollo_tp.coordinator.samples.schema import Score
from apollo_tp.errors import RequestError, refuse
from apollo_tp.wire.capture import CAPTURES_PATH, Captured

THUMBS = {"up": 1.0, "down": 0.0}
CHAT = "/v1/chat/completions"


class FeedbackBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /feedback: which stored completion is meant (its id, or the newest of a session), and exactly one of a
    reward, a thumb (``up`` is the reward 1, ``down`` 0), and a corrected answer."""

    completion_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    session: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    choice: Annotated[int, Meta(ge=0, le=1024)] = 0
    reward: Score | None = None
    thumb: Annotated[str, Meta(pattern="^(up|down)$")] | None = None
    corrected: Annotated[str, Meta(min_length=1, max_length=1_000_000)] | None = None


class CompletionsQuery(NoQuery):
    """Query of the list of stored completions."""

    after: str = ""
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Annotated[str, Field(pattern="^(asc|desc)$")] = "asc"
    model: str = ""


router = APIRouter(route_class=StrictRoute)


@router.post(CAPTURES_PATH, status_code=204, include_in_schema=False)
async def store(request: Request, service: ServiceParts) -> Response:
    """Store a completion that the plugin in the server has recorded."""
    captures = _captures(service)
    record = await decode_body(await request.body(), Captured)
    await captures.add(record, service.version_at(record.created))
    return Response(status_code=204)


@router.post("/feedback", status_code=202, openapi_extra=json_body(FeedbackBody))
async def feedback(request: Request, service: ServiceParts) -> Response:
    """Feedback on a stored completion; it is stored when this answers 202. One per answer: the first one counts."""
    captures = _captures(service)
    body = await decode_body(await request.body(), FeedbackBody)
    given = [name for name in ("reward", "thumb", "corrected") if getattr(body, name) is not None]
    if len(given) != 1:
        raise refuse("feedback", " and ".join(given) or "none", "exactly one of reward, thumb and corrected")
    if (body.completion_id is None) == (body.session is None):
        raise refuse("completion_id", "both or neither of completion_id and session", "exactly one of them")
    service.votes.count(request.state.client)
    if body.completion_id is not None:
        stored = await captures.find(body.completion_id)
    else:
        stored = await captures.of_session(body.session or "")
    if stored is None:
        raise _unknown(body.completion_id or body.session or "")
    if body.choice >= len(stored.captured.choices):
        raise refuse(
            "choice", str(body.choice), f"0 to {len(stored.captured.choices) - 1}, an answer of this completion"
        )
    reward = THUMBS[body.thumb] if body.thumb else body.reward
    if reward is not None and stored.captured.not_comparable:
        raise refuse("reward", f"it on a completion of {stored.captured.not_comparable}", "a completion that was sampled "
                     "from the model's own distribution, or a corrected answer")  # fmt: skip
    if body.corrected is not None and stored.captured.messages == msgspec.Raw(b"null"):
        raise refuse("corrected", "it on a text completion", "it on a chat completion")
    if not await captures.vote(stored.seq, body.choice, reward, body.corrected):
        raise refuse("feedback", "a second one on this answer", "one on each", status=409, code="already_given")
    answer = {"object": "feedback", "completion_id": stored.captured.id, "choice": body.choice}
    return JSONResponse(answer, status_code=202)


@router.get(CHAT)
async def completions(query: Annotated[CompletionsQuery, Query()], service: ServiceParts) -> Response:
    """Stored completions, oldest first unless `order=desc`; none while capture.enabled is false."""
    if service.captures is None:
        return JSONResponse(_page([], more=False))
    after = None
    if query.after:
        last = await service.captures.find(query.after)
        if last is None:
            raise unknown_cursor(query.after, "a stored completion")
        after = last.seq
    found, more = await service.captures.page(
        after=after, limit=query.limit, newest_first=query.order == "desc", model=query.model or None
    )
    return JSONResponse(_page([_view(stored) for stored in found], more=more))


@router.get(f"{CHAT}/{{completion_id}}")
async def completion(completion_id: str, service: ServiceParts) -> Response:
    """One stored completion."""
    return JSONResponse(_view(await _find(service, completion_id)))


@router.get(f"{CHAT}/{{completion_id}}/messages")
async def messages(completion_id: str, service: ServiceParts) -> Response:
    """The messages to which a stored completion is the answer."""
    stored = await _find(service, completion_id)
    given = msgspec.json.decode(stored.captured.messages) or []
    shown = [message | {"id": f"{completion_id}-{index}"} for index, message in enumerate(given)]
    return JSONResponse(_page(shown, more=False))


@router.delete(f"{CHAT}/{{completion_id}}")
async def delete(completion_id: str, service: ServiceParts) -> Response:
    """Remove a stored completion, and the feedback on it."""
    await _find(service, completion_id)
    await _captures(service).remove(identity=completion_id)
    return JSONResponse({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})


@router.delete("/train/sessions/{session}")
async def delete_session(session: str, service: ServiceParts) -> Response:
    """Remove all stored completions of a session, and the feedback on them."""
    count = await _captures(service).remove(session=session)
    return JSONResponse({"object": "train.session.deleted", "session": session, "num_completions": count})


def _captures(service: Service) -> Captures:
    if service.captures is None:
        raise RequestError(
            "capture: got false, expected completions to be stored; start the trainer with capture.enabled=true",
            status=409, code="capture_off",
        )  # fmt: skip
    return service.captures


async def _find(service: Service, completion_id: str) -> Stored:
    stored = await service.captures.find(completion_id) if service.captures is not None else None
    if stored is None:
        raise _unknown(completion_id)
    return stored


def _unknown(name: str) -> RequestError:
    return refuse("completion_id", repr(name[:64]), "a stored completion", status=404, code="no_such_completion")


def _page(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return listing(data, more) | ids


def _view(stored: Stored) -> dict[str, Any]:
    """The completion as OpenAI's ChatCompletion; ``session`` and ``weight_version`` are ours."""
    captured = stored.captured
    num_completion = sum(len(choice.token_ids) for choice in captured.choices)
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "finish_reason": choice.finish_reason or "stop",
            "logprobs": None,
        }
        for choice in captured.choices
    ]
    return {
        "id": captured.id,
        "object": "chat.completion",
        "created": int(captured.created),
        "model": captured.model,
        "choices": choices,
        "metadata": captured.metadata,
        "session": captured.session,
        "weight_version": stored.weight_version,
        "usage": {
            "prompt_tokens": len(captured.prompt_ids),
            "completion_tokens": num_completion,
            "total_tokens": len(captured.prompt_ids) + num_completion,
        },
    }


async def prune(captures: Captures, interval_seconds: float = 60.0) -> None:
    """Remove what has become too old, now and then."""
    while True:
        await captures.prune()
        await asyncio.sleep(interval_seconds)
