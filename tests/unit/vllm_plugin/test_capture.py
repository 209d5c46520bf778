"""What the plugin records at the engine: only what was asked for, complete, and without a difference for the client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.datastructures import Headers

from apollo_tp.vllm_plugin import capture
from apollo_tp.vllm_plugin.capture import CaptureMiddleware, Recorder, wanted
from apollo_tp.wire.capture import Captured

SESSION = Headers({"x-apollo-session": "someone"})


class Parameters(SimpleNamespace):
    """Sampling parameters as vLLM's."""

    def __init__(self, **given: Any) -> None:
        plain = {
            "logprobs": None,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "output_kind": SimpleNamespace(name="DELTA"),
        }
        super().__init__(**(plain | given))

    def clone(self) -> Parameters:
        return Parameters(**vars(self))


def _choice(index: int, *tokens: int, finish: str | None = None) -> SimpleNamespace:
    logprobs = [{token: SimpleNamespace(logprob=-0.5 * token), 99: SimpleNamespace(logprob=0.0)} for token in tokens]
    text = "".join(f"<{token}>" for token in tokens)
    return SimpleNamespace(index=index, text=text, token_ids=list(tokens), logprobs=logprobs, finish_reason=finish)


def _outputs(*steps: list[SimpleNamespace]) -> list[SimpleNamespace]:
    last = len(steps) - 1
    return [
        SimpleNamespace(outputs=step, finished=number == last, prompt_token_ids=[1, 2])
        for number, step in enumerate(steps)
    ]


class Engine:
    """Yields ``outputs``; notes with which parameters it was asked, and whether its stream was closed."""

    def __init__(self, outputs: list[SimpleNamespace], error: Exception | None = None) -> None:
        self.outputs, self.error, self.asked, self.closed = outputs, error, [], False

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **_: Any) -> AsyncGenerator[Any, None]:
        self.asked.append(sampling_params)
        try:
            for output in self.outputs:
                yield output
            if self.error:
                raise self.error
        finally:
            self.closed = True


async def _recorded(
    engine: Engine,
    parameters: Parameters,
    asked: capture.Wanted | None,
    *,
    take: int = 1000,
    mode: str = "raw_logprobs",
) -> tuple[list[Any], list[Captured]]:
    """What a client gets of the engine, and what is recorded."""
    sent: list[Captured] = []

    async def send(record: bytes) -> None:
        sent.append(msgspec.json.decode(record, type=Captured))

    Recorder(send, mode).attach(engine)
    token = capture._wanted.set(asked)
    got = []
    try:
        stream = engine.generate(None, parameters, "cmpl-7-0")
        async for output in stream:
            got.append([(choice.token_ids, choice.logprobs) for choice in output.outputs])
            if len(got) == take:
                break
        await stream.aclose()
    finally:
        capture._wanted.reset(token)
    await asyncio.sleep(0.01)
    return got, sent


ASKED = capture.Wanted("s", capture._Request(model="demo", messages=msgspec.Raw(b"[]")))


def test_parts_of_a_stream_become_one_record() -> None:
    """With the log-probabilities of the sampled tokens, which the client, who did not ask for any, does not see."""
    steps = (
        [_choice(0, 3)],
        [_choice(1, 4), _choice(0, 5)],
        [_choice(1, 6, finish="stop"), _choice(0, finish="length")],
    )
    engine, parameters = Engine(_outputs(*steps)), Parameters()
    got, sent = asyncio.run(_recorded(engine, parameters, ASKED))
    assert [[tokens for tokens, _ in step] for step in got] == [[[3]], [[4], [5]], [[6], []]]
    assert all(logprobs is None for step in got for _, logprobs in step)
    assert (engine.asked[0].logprobs, parameters.logprobs) == (0, None)
    (record,) = sent
    assert (record.id, record.session, record.model, record.prompt_ids) == ("cmpl-7", "s", "demo", [1, 2])
    first, second = record.choices
    assert (first.token_ids, first.logprobs, first.text, first.finish_reason) == (
        [3, 5],
        [-1.5, -2.5],
        "<3><5>",
        "length",
    )
    assert (second.token_ids, second.logprobs, second.finish_reason) == ([4, 6], [-2.0, -3.0], "stop")


def test_a_client_that_asks_for_log_probabilities_gets_them() -> None:
    got, sent = asyncio.run(_recorded(Engine(_outputs([_choice(0, 3)])), Parameters(logprobs=2), ASKED))
    assert got[0][0][1] is not None
    assert sent[0].choices[0].logprobs == [-1.5]


def test_cumulative_outputs_are_not_added_up() -> None:
    parameters = Parameters(output_kind=SimpleNamespace(name="CUMULATIVE"))
    _, sent = asyncio.run(_recorded(Engine(_outputs([_choice(0, 3)], [_choice(0, 3, 4)])), parameters, ASKED))
    assert sent[0].choices[0].token_ids == [3, 4]


@pytest.mark.parametrize("case", ["not asked", "client went", "engine failed", "cut off"])
def test_nothing_is_recorded_of_what_is_not_asked_for_or_not_complete(case: str) -> None:
    engine = Engine(
        _outputs([_choice(0, 3)], [_choice(0, 4)]), RuntimeError("boom") if case == "engine failed" else None
    )
    asked = None if case == "not asked" else ASKED
    engine.outputs[-1].finished = case != "cut off"
    if case == "engine failed":
        with pytest.raises(RuntimeError, match="boom"):
            asyncio.run(_recorded(engine, Parameters(), asked))
    else:
        _, sent = asyncio.run(_recorded(engine, Parameters(), asked, take=1 if case == "client went" else 1000))
        assert sent == []
    assert engine.closed
    assert engine.asked[0].logprobs == (None if case == "not asked" else 0)


@pytest.mark.parametrize(
    ("changes", "mode", "reason"),
    [
        ({}, "raw_logprobs", ""),
        ({"temperature": 0.0}, "processed_logprobs", "temperature=0 samples nothing"),
        ({"temperature": 0.7}, "processed_logprobs", ""),
        ({"temperature": 0.7}, "raw_logprobs", "--logprobs-mode raw_logprobs is not at the temperature"),
        ({"top_p": 0.9}, "processed_logprobs", "top_p=0.9"),
        ({"top_k": -1}, "processed_logprobs", ""),
        ({"top_k": 20}, "processed_logprobs", "top_k=20"),
        ({"repetition_penalty": 1.1}, "processed_logprobs", "repetition_penalty=1.1"),
        ({"logit_bias": {3: 1.0}}, "processed_logprobs", "logit_bias"),
        ({"bad_words": []}, "processed_logprobs", ""),
        ({"structured_outputs": "json"}, "processed_logprobs", "structured_outputs=json"),
    ],
)
def test_other_distributions_than_the_models_are_said(changes: dict[str, Any], mode: str, reason: str) -> None:
    _, sent = asyncio.run(_recorded(Engine(_outputs([_choice(0, 3)])), Parameters(**changes), ASKED, mode=mode))
    assert sent[0].not_comparable.startswith(reason)
    assert bool(sent[0].not_comparable) == bool(reason)


def test_a_coordinator_that_does_not_take_them_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond some that wait, records are dropped; that is said once a minute."""
    monkeypatch.setattr(capture, "MAX_WAITING", 2)
    logging.getLogger("vllm").propagate = True

    async def run() -> None:
        async def send(record: bytes) -> None:
            await asyncio.Event().wait()

        recorder, engine = Recorder(send, "raw_logprobs"), Engine(_outputs([_choice(0, 3)]))
        recorder.attach(engine)
        capture._wanted.set(ASKED)
        for number in range(6):
            async for _ in engine.generate(None, Parameters(), f"chatcmpl-{number}"):
                pass
            await asyncio.sleep(0)

    asyncio.run(run())
    assert sum("captured completions were not stored" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("headers", "body", "session"),
    [
        (Headers({}), {"store": True}, ""),
        (SESSION, {}, "someone"),
        (SESSION, {"store": False}, "someone"),
        (Headers({}), {"store": False}, None),
        (Headers({}), {"store": None, "messages": [{"content": '"store": true'}]}, None),
        (Headers({}), {"messages": [{"content": '{"store": true}'}]}, None),
        (Headers({}), {"store": "true"}, None),
        (Headers({"x-apollo-session": "x" * 129}), {}, None),
        (Headers({"x-apollo-session": "a\tb"}), {}, None),
        (SESSION, {"prompt": ["a", "b"]}, None),
        (SESSION, {"prompt": ["a"]}, "someone"),
        (SESSION, {"prompt": [1, 2, 3]}, "someone"),
    ],
)
def test_only_who_asks_is_recorded(headers: Headers, body: dict[str, Any], session: str | None) -> None:
    found = wanted(headers, json.dumps(body).encode())
    assert (found.session if found else None) == session


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"store"', b"\xff\xfe", b'{"store": true, "metadata": 3}'])
def test_a_malformed_request_is_vllms_business(body: bytes) -> None:
    assert wanted(SESSION, body) is None


@pytest.mark.parametrize(
    ("path", "size", "on", "seen"),
    [
        ("/v1/chat/completions", 10, True, True),
        ("/prefix/v1/completions", 10, True, True),
        ("/v1/chat/completions", 10, False, False),
        ("/v1/embeddings", 10, True, False),
        ("/v1/chat/completions", 1000, True, False),
    ],
)
def test_the_application_gets_the_body_as_it_came(
    path: str, size: int, on: bool, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same parts, whether it is looked into or not, and then the client's disconnect."""
    monkeypatch.setattr(capture, "MAX_BODY_BYTES", 200)
    body = b'{"store": true, "messages": "' + b"x" * size + b'"}'
    parts = [body[:7], body[7:20], body[20:]]
    sent = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    waiting = [*sent, {"type": "http.disconnect"}]
    got, asked = [], []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(capture._wanted.get())
        got.extend([await receive() for _ in range(4)])

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await CaptureMiddleware(app, lambda: on)(scope, receive, None)  # type: ignore[arg-type]

    asyncio.run(run())
    assert got == [*sent, {"type": "http.disconnect"}]
    assert (asked[0] is not None) == seen
