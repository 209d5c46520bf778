"""Records completions whose clients let them be stored, at the engine: the very tokens, with their log-probabilities.

Only while a trainer with ``capture.enabled`` runs, and only requests that ask for it: ``"store": true`` in the body, as in
OpenAI's API, or a header that names a session. What the client receives is not changed. Records are sent to the coordinator
by a task of its own; where it does not keep up, they are dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apollo_tp.errors import DECODE_ERRORS
from apollo_tp.wire.capture import Captured, CapturedChoice

logger = logging.getLogger("vllm.apollo_tp")

PATHS = ("/v1/chat/completions", "/v1/completions")
SESSION_HEADER = "x-apollo-session"
MAX_BODY_BYTES = 8 * 2**20
"""Larger requests are not looked into, and not captured."""
MAX_SESSION = 128
MAX_WAITING = 1024
"""Records that wait to be sent."""
REPORT_SECONDS = 60.0
"""Between two lines about records that were dropped."""
ALTERED = {
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_p": 1.0, "min_p": 0.0,
    "min_tokens": 0, "logit_bias": None, "allowed_token_ids": None, "bad_words": None, "structured_outputs": None,
    "logits_processors": None, "thinking_token_budget": None,
}  # fmt: skip
"""Sampling parameters, and the values with which tokens are drawn from the model's own distribution."""


class _Request(msgspec.Struct, frozen=True):
    """The fields of a request that are looked at. Others are vLLM's business, and so are errors."""

    store: bool | None = None
    messages: msgspec.Raw = msgspec.Raw(b"null")
    prompt: Any = None
    model: str | None = None
    metadata: dict[str, str] | None = None


class Wanted(msgspec.Struct, frozen=True):
    """A request whose completions are to be recorded."""

    session: str
    request: _Request


_wanted: contextvars.ContextVar[Wanted | None] = contextvars.ContextVar("captured request", default=None)


def wanted(headers: Headers, body: bytes) -> Wanted | None:
    """What is asked for, or None: nothing is recorded of a request that does not ask, or that is no completion's."""
    session = headers.get(SESSION_HEADER, "")
    if not session and b'"store"' not in body:
        return None
    try:
        request = msgspec.json.decode(body, type=_Request)
    except DECODE_ERRORS:
        return None
    if not (session or request.store is True) or len(session) > MAX_SESSION or not session.isprintable():
        return None
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) != 1 and not all(isinstance(token, int) for token in prompt):
        return None  # several prompts would have one id
    return Wanted(session, request)


class CaptureMiddleware:
    """ASGI middleware of vLLM's application that finds the requests to record. ``is_on`` is asked for each."""

    def __init__(self, app: ASGIApp, is_on: Callable[[], bool]) -> None:
        self._app, self._is_on = app, is_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or not path.endswith(PATHS) or not self._is_on():
            await self._app(scope, receive, send)
            return
        messages, body = await _read(receive)
        if body is not None:
            _wanted.set(wanted(Headers(scope=scope), body))

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


async def _read(receive: Receive) -> tuple[list[Message], bytes | None]:
    """The messages of a request's body, and the body; None if it is too large, or if the client went away."""
    messages: list[Message] = []
    body = b""
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > MAX_BODY_BYTES:
            return messages, None
        if not message.get("more_body", False):
            return messages, body


class Recorder:
    """Stands before the engine's ``generate``. ``send`` delivers a record and raises if it cannot; ``logprobs_mode`` is the
    engine's option."""

    def __init__(self, send: Callable[[bytes], Any], logprobs_mode: str) -> None:
        self._send, self._mode = send, logprobs_mode
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)
        self._task: asyncio.Task[None] | None = None
        self._dropped, self._reported_at = 0, -math.inf

    def attach(self, engine: Any) -> None:
        """Record what ``engine.generate`` yields from now on."""
        original = engine.generate

        def generate(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
            asked = _wanted.get()
            if asked is None or not hasattr(sampling_params, "logprobs"):
                return original(prompt, sampling_params, request_id, *args, **kwargs)
            parameters, hide = sampling_params, sampling_params.logprobs is None
            if hide:
                parameters = sampling_params.clone()
                parameters.logprobs = 0  # that of the sampled token alone
            stream = original(prompt, parameters, request_id, *args, **kwargs)
            return self._recorded(stream, asked, parameters, request_id, hide)

        engine.generate = generate

    async def _recorded(
        self, stream: Any, asked: Wanted, parameters: Any, request_id: str, hide: bool
    ) -> AsyncGenerator[Any, None]:
        created, choices = time.time(), dict[int, CapturedChoice]()
        cumulative = getattr(parameters.output_kind, "name", "") == "CUMULATIVE"
        output = None
        try:
            async for output in stream:
                for choice in output.outputs:
                    before = None if cumulative else choices.get(choice.index)
                    choices[choice.index] = _joined(before, choice)
                    if hide:
                        choice.logprobs = None
                yield output
        finally:
            await stream.aclose()
        if output is not None and output.finished:
            self._queue_record(asked, parameters, request_id, created, output.prompt_token_ids, choices)

    def _queue_record(
        self,
        asked: Wanted,
        parameters: Any,
        request_id: str,
        created: float,
        prompt_ids: Any,
        choices: dict[int, CapturedChoice],
    ) -> None:
        record = Captured(
            id=request_id.rpartition("-")[0] if request_id.startswith("cmpl-") else request_id,
            session=asked.session,
            model=asked.request.model or "",
            created=created,
            prompt_ids=list(prompt_ids or ()),
            choices=[choices[index] for index in sorted(choices)],
            messages=asked.request.messages,
            metadata=asked.request.metadata or {},
            temperature=parameters.temperature,
            not_comparable=self._why_not(parameters),
        )
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._deliver(), name="captures")
        try:
            self._queue.put_nowait(msgspec.json.encode(record))
        except asyncio.QueueFull:
            self._drop("the coordinator takes them too slowly")

    def _why_not(self, parameters: Any) -> str:
        """Why the log-probabilities are not those of the model's own distribution at the temperature of sampling."""
        if parameters.temperature == 0:
            return "temperature=0 samples nothing"
        if parameters.temperature != 1 and self._mode != "processed_logprobs":
            return f"--logprobs-mode {self._mode} is not at the temperature of sampling; use processed_logprobs"
        if parameters.top_k not in (0, -1):
            return f"top_k={parameters.top_k}"
        for name, plain in ALTERED.items():
            if (value := getattr(parameters, name, plain)) not in (plain, None, [], {}):
                return f"{name}={value}"
        return ""

    async def _deliver(self) -> None:
        while True:
            record = await self._queue.get()
            try:
                await self._send(record)
            except Exception as error:  # noqa: BLE001 - the plugin's edge: serving must not depend on the trainer
                self._drop(str(error))

    def _drop(self, reason: str) -> None:
        self._dropped += 1
        if time.monotonic() - self._reported_at > REPORT_SECONDS:
            logger.warning("apollo_tp: %d captured completions were not stored: %s", self._dropped, reason)
            self._dropped, self._reported_at = 0, time.monotonic()


def _joined(before: CapturedChoice | None, choice: Any) -> CapturedChoice:
    """An answer with what the engine yields of it."""
    token_ids = list(choice.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(token_ids, choice.logprobs or (), strict=False)]
    if before is None:
        return CapturedChoice(choice.index, choice.text, token_ids, logprobs, choice.finish_reason or "")
    return CapturedChoice(
        choice.index,
        before.text + choice.text,
        before.token_ids + token_ids,
        before.logprobs + logprobs,
        choice.finish_reason or before.finish_reason,
    )
