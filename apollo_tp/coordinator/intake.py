"""A checked request becomes samples: forms, limits, truncation. Nothing of a refused request is stored or sent."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import msgspec

from apollo_tp.coordinator.evaluation import Pair
from apollo_tp.coordinator.jobs import JobSpec, Truncate
from apollo_tp.coordinator.render import Renderer
from apollo_tp.coordinator.schema import Message, PreferenceLine, SampleBody, TrainBody
from apollo_tp.errors import RequestError
from apollo_tp.protocol import Sample


@dataclass(frozen=True)
class Limits:
    """What the ranks take. ``vocab_size`` None when neither rank 0 nor the model folder has said it."""

    vocab_size: int | None
    max_sequence_tokens: int


def refuse(field: str, got: str, expected: str, **options: Any) -> RequestError:
    """A RequestError whose message is its three parts."""
    return RequestError(f"{field}: got {got}, expected {expected}", field=field, got=got, expected=expected, **options)


class Intake:
    """Makes samples of one request. ``renderer`` None: only token ids are taken."""

    def __init__(self, renderer: Renderer | None, limits: Limits, truncate: Truncate) -> None:
        self._renderer, self._limits, self._truncate = renderer, limits, truncate

    def train_samples(self, body: TrainBody) -> list[Sample]:
        """All samples of a POST /train body."""
        if body.samples is None:
            return [self.sample(body, "")]
        own = [name for name in SampleBody.__struct_fields__ if getattr(body, name) not in (None, True, 1.0)]
        if own:
            raise refuse(own[0], "it beside 'samples'", "either 'samples' or the fields of one sample")
        return self.samples(body.samples)

    def samples(self, bodies: list[SampleBody]) -> list[Sample]:
        """Those of a list ``samples``."""
        return [self.sample(sample, f"samples[{index}].") for index, sample in enumerate(bodies)]

    def sample(self, body: SampleBody, where: str) -> Sample:
        """One sample; ``where`` prefixes the field in errors."""
        given = {
            "context_ids + continuation_ids": body.context_ids is not None or body.continuation_ids is not None,
            "messages": body.messages is not None,
            "prompt + completion": body.prompt is not None or body.completion is not None,
            "text": body.text is not None,
        }
        forms = [name for name, present in given.items() if present]
        if len(forms) != 1:
            field = where.rstrip(".") or "body"
            raise refuse(field, " and ".join(forms) or "no data", "exactly one of " + ", ".join(given))
        if body.tools is not None and body.messages is None:
            raise refuse(f"{where}tools", "tools without messages", "tools only beside messages")
        try:
            ids, weights = self._tokens(body)
        except RequestError as error:
            error.field = f"{where}{error.field}" if error.field else where.rstrip(".")
            raise
        return self.checked(ids, [weight * body.weight for weight in weights], where + forms[0].rpartition(" ")[2])

    def _tokens(self, body: SampleBody) -> tuple[list[int], list[float]]:
        if body.messages is not None:
            return self._chat(body.messages, body.tools)
        if body.text is not None:
            return self._text_renderer("text").text(body.text, append_eos=body.append_eos)
        if body.prompt is not None or body.completion is not None:
            if not body.completion:
                raise refuse("completion", "an empty completion" if body.completion == "" else "nothing", "some text")
            renderer = self._text_renderer("prompt")
            return renderer.prompt_completion(body.prompt or "", body.completion, append_eos=body.append_eos)
        if not body.continuation_ids:
            raise refuse("continuation_ids", "no token", "at least one token id")
        context, target = body.context_ids or [], body.continuation_ids
        for name, ids in (("context_ids", context), ("continuation_ids", target)):
            self._check_vocabulary(name, ids)
        return [*context, *target], [0.0] * len(context) + [1.0] * len(target)

    def _check_vocabulary(self, name: str, ids: list[int]) -> None:
        size = self._limits.vocab_size
        if size is None:
            raise RequestError(
                "token ids cannot be checked before the trainer has connected; try again later",
                status=503,
                code="no_trainer",
            )
        for index, token in enumerate(ids):
            if not 0 <= token < size:
                raise refuse(f"{name}[{index}]", str(token), f"a token id from 0 to {size - 1}")

    def _text_renderer(self, field: str) -> Renderer:
        if self._renderer is None:
            raise refuse(
                field, "text", "token ids (context_ids, continuation_ids): the trainer found no tokenizer.json"
            )
        return self._renderer

    def _chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, only_last: bool = False
    ) -> tuple[list[int], list[float]]:
        renderer = self._text_renderer("messages")
        weights = []
        for index, message in enumerate(messages):
            assistant = message.role == "assistant"
            if message.weight is not None and not assistant:
                raise refuse(
                    f"messages[{index}].weight", f"a weight on role {message.role!r}", "a weight only on assistant"
                )
            weights.append((1.0 if message.weight is None else message.weight) if assistant else -1.0)
        if only_last:
            weights = [min(weight, 0.0) for weight in weights[:-1]] + weights[-1:]
        if not any(weight > 0 for weight in weights):
            raise refuse("messages", "no assistant message with a weight above 0", "at least one to learn from")
        try:
            plain = [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]
            return renderer.chat(plain, weights, tools)
        except RecursionError:
            raise refuse("messages", "values nested too deep to be rendered", "a few levels") from None

    def checked(self, ids: list[int], weights: list[float], field: str) -> Sample:
        """Apply limits and truncation."""
        limit = self._limits.max_sequence_tokens
        if len(ids) > limit:
            if self._truncate is Truncate.refuse:
                raise refuse(field, f"{len(ids)} tokens", f"at most {limit} (or set truncate to 'left' or 'right')",
                             code="sequence_too_long")  # fmt: skip
            part = slice(-limit, None) if self._truncate is Truncate.left else slice(0, limit)
            ids, weights = ids[part], weights[part]
        # the first token of a sequence has no predictor
        weights = [0.0, *weights[1:]]
        if not any(weights):
            raise refuse(field, f"{len(ids)} tokens of which none can be learned from",
                         "at least one token of the continuation behind another token")  # fmt: skip
        self._check_vocabulary(field, ids)
        return Sample(token_ids=ids, weights=weights)

    def pair(self, line: PreferenceLine) -> Pair:
        """A DPO line: both sides share the input; only the last assistant message of each is learned from."""
        sides = []
        for name, output in (
            ("preferred_output", line.preferred_output),
            ("non_preferred_output", line.non_preferred_output),
        ):
            if output[-1].role != "assistant":
                raise refuse(f"{name}[{len(output) - 1}].role", repr(output[-1].role), "'assistant'")
            ids, weights = self._chat([*line.input.messages, *output], line.input.tools, only_last=True)
            sides.append(self.checked(ids, weights, name))
        return Pair(*sides)


def _plain(message: Message, where: str) -> dict[str, Any]:
    """The message as vLLM gives it to a template: no weight, no absent fields, text parts joined, arguments decoded."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain.pop("weight", None)
    content = plain.setdefault("content", "")
    if isinstance(content, list):
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise refuse("messages", "a content part that is not text", "text parts only")
        plain["content"] = "\n".join(str(text) for text in texts)
    if message.role == "assistant":
        calls = plain.pop("tool_calls", None) or []
        if calls:
            plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return plain


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call whose arguments, a string of JSON in OpenAI's format, are an object."""
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise refuse(where, "another kind of call", "type 'function' and an object 'function'")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays a string
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        # vLLM goes on with {} here, for the sake of a running conversation; nobody should learn that
        raise refuse(f"{where}.function.arguments", repr(arguments)[:80], "a JSON object, or its text")
    return call | {"function": function | {"arguments": arguments}}


def spec_of(body: TrainBody) -> JobSpec:
    """How a POST /train body asks to be trained."""
    return JobSpec(
        epochs=body.epochs,
        batch_size=body.batch_size,
        learning_rate_scale=body.learning_rate_scale,
        seed=body.seed,
        max_steps=body.max_steps,
        truncate=body.truncate,
        metadata=body.metadata,
    )
