"""One JSON object of a client as a sample: absent fields, and other formats whose meaning is unambiguous.

Null is absent for every field, and an empty value for a field that is not known here: libraries write all fields of a
message. ShareGPT's ``conversations``, Alpaca's ``instruction`` and TRL's conversational ``prompt`` become ``messages``.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from apollo_tp.coordinator.samples.field_names import meant_by
from apollo_tp.coordinator.samples.lines import EXPECTED, malformed
from apollo_tp.coordinator.samples.schema import (
    Message,
    Preference,
    PreferenceLine,
    SampleBody,
    is_absent,
    schema_error,
)
from apollo_tp.coordinator.samples.unique_keys import check_unique_keys
from apollo_tp.errors import DECODE_ERRORS, RequestError, refuse

T = TypeVar("T", bound=msgspec.Struct)
Json = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
ACCEPTED = (
    "messages; prompt + completion; text; context_ids + continuation_ids; ShareGPT's conversations; Alpaca's instruction + "
    "output; or TRL's prompt + completion of messages"
)
OTHER_FORMS = (
    "context_ids",
    "continuation_ids",
    "prompt",
    "completion",
    "text",
    "conversations",
    "conversation",
    "instruction",
)
"""Fields of a sample that is no ``messages``."""
INSTEAD = {
    "functions": "tools, each {'type': 'function', 'function': {...}}",
    "input": "it only in files for method 'dpo'", "preferred_output": "it only in files for method 'dpo'",
    "non_preferred_output": "it only in files for method 'dpo'",
    "chosen": "input.messages, preferred_output and non_preferred_output in a file for method 'dpo'",
    "rejected": "input.messages, preferred_output and non_preferred_output in a file for method 'dpo'",
}  # fmt: skip
"""Fields of other formats, and what to send."""


def read_sample(data: bytes, kind: type[T], where: str = "") -> T:
    """A line of a file, or an element of a request's ``samples``. ``where`` prefixes the field in errors. Raises
    RequestError."""
    data = data.removeprefix(codecs.BOM_UTF8)
    check_unique_keys(data, where)
    try:
        return msgspec.json.decode(data, type=kind)
    except DECODE_ERRORS as error:
        if not isinstance(error, msgspec.ValidationError):
            raise schema_error(error, data, kind, where) from error
        return _read_other(data, kind, where, error)


def read_line(line: bytes, kind: type[T]) -> T:
    """A line of a file; ``read_sample`` with known mistakes of writing JSON in words."""
    try:
        return read_sample(line, kind)
    except RequestError as error:
        if error.code == "malformed_json" and (got := malformed(line)):
            raise refuse("body", got, EXPECTED, code=error.code) from error
        raise


def _read_other(data: bytes, kind: type[T], where: str, first: Exception) -> T:
    try:
        value = msgspec.json.decode(data)
    except DECODE_ERRORS:  # of what the first attempt did not come to
        raise schema_error(first, data, kind, where) from first
    if not isinstance(value, dict):
        raise schema_error(first, data, kind, where) from first
    value = _without_absent(value, kind)
    try:
        if issubclass(kind, SampleBody):
            value = _as_messages(value)
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        # if nothing was absent or converted, the first error is this one
        raise _unknown_form(schema_error(error, data, kind, where), value, kind, where) from error
    except RequestError as error:
        error.field = f"{where}{error.field}"
        raise


def _without_absent(value: Json, kind: type[msgspec.Struct]) -> Json:
    """``value`` without nulls and without empty unknown fields, also in its messages; what clients fill freely (tools,
    arguments, contents) stays as it is."""
    known = set(kind.__struct_fields__)
    present = {
        name: field for name, field in value.items() if field is not None and (name in known or not is_absent(field))
    }
    if present.get("messages") == [] and any(present.get(name) for name in OTHER_FORMS):
        del present["messages"]
    for name in ("messages", "preferred_output", "non_preferred_output"):
        if isinstance(present.get(name), list):
            present[name] = [_without_absent(m, Message) if isinstance(m, dict) else m for m in present[name]]
    if kind is PreferenceLine and isinstance(present.get("input"), dict):
        present["input"] = _without_absent(present["input"], Preference)
    return present


def _unknown_form(error: RequestError, value: Json, kind: type[msgspec.Struct], where: str) -> RequestError:
    """The error with the accepted forms in it, if a field of ``value`` is unknown or missing."""
    name = (error.field or "").removeprefix(where)
    known = kind.__struct_fields__
    if kind is PreferenceLine and (name in known) != (name in value):
        got = "nothing" if name in known else "an unknown field"
        return refuse(
            f"{where}{name}"[:80], got, "input.messages, preferred_output and non_preferred_output (method 'dpo')"
        )
    if issubclass(kind, SampleBody) and name in value and name not in known:
        expected = INSTEAD.get(name) or meant_by(name, known) or ACCEPTED
        return refuse(f"{where}{name}"[:80], "an unknown field", expected, code=error.code)
    return error


def _as_messages(value: Json) -> Json:
    """``value`` with ``messages`` in place of those of another format. Raises RequestError if their meaning is ambiguous."""
    form = _other_form(value)
    return _CONVERSIONS[form](value) if form else value


def _other_form(value: Json) -> str | None:
    """The name of the other format that ``value`` has."""
    if "messages" in value:
        return None
    named = {"conversations": "ShareGPT", "conversation": "ShareGPT", "instruction": "Alpaca", "prompt": "TRL"}
    form = next((form for name, form in named.items() if name in value), None)
    return None if form == "TRL" and not isinstance(value["prompt"], list) else form


def converted_from(sample: bytes) -> str | None:
    """The format from which a sample that was accepted has been converted to messages: ShareGPT, Alpaca or TRL."""
    return _other_form(_without_absent(msgspec.json.decode(sample, type=dict), SampleBody))


def _from_sharegpt(value: Json) -> Json:
    name = "conversations" if "conversations" in value else "conversation"
    turns, rest = value[name], {other: field for other, field in value.items() if other not in (name, "system")}
    if not isinstance(turns, list) or not turns:
        raise refuse(name, repr(turns)[:80], "a list of {'from', 'value'}, ShareGPT's form")
    system = value.get("system")
    if system and isinstance(turns[0], dict) and "system" in (turns[0].get("from"), turns[0].get("role")):
        raise refuse("system", f"it beside a system message in {name}", "one of them")
    messages: list[Json] = [] if not system else [{"role": "system", "content": system}]
    for index, turn in enumerate(turns):
        at = f"{name}[{index}]"
        if not isinstance(turn, dict) or not {"role", "from"} & turn.keys():
            raise refuse(at, repr(turn)[:80], "{'from', 'value'}, ShareGPT's form")
        if "from" not in turn:
            messages.append(turn)
            continue
        if turn["from"] not in tuple(SHAREGPT_ROLES):
            raise refuse(
                f"{at}.from", repr(turn["from"])[:80], f"one of {', '.join(SHAREGPT_ROLES)}; or messages with tools"
            )
        other = {key: field for key, field in turn.items() if key not in ("from", "value")}
        messages.append({**other, "role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return rest | {"messages": messages}


def _from_alpaca(value: Json) -> Json:
    if value.get("input"):
        raise refuse(
            "input", "an input beside the instruction, which are joined in several ways",
            "messages, with the user's message as it will be served",
        )  # fmt: skip
    if not isinstance(value["instruction"], str) or not isinstance(value.get("output"), str):
        raise refuse("output", "an instruction without an output", "instruction and output, both text")
    used = ("instruction", "input", "output", "system", "history")
    rest = {name: field for name, field in value.items() if name not in used or (name == "history" and field)}
    system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    asked = {"role": "user", "content": value["instruction"]}
    return rest | {"messages": [*system, asked, {"role": "assistant", "content": value["output"]}]}


def _from_trl(value: Json) -> Json:
    """Of TRL's conversational form the completion alone is learned."""
    prompt, completion = value["prompt"], value.get("completion")
    if isinstance(prompt, list) and "chosen" in value:
        raise refuse("chosen", "a pair of answers", INSTEAD["chosen"])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return value
    context = [m | {"weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    rest = {name: field for name, field in value.items() if name not in ("prompt", "completion")}
    return rest | {"messages": [*context, *completion]}


_CONVERSIONS: dict[str, Callable[[Json], Json]] = {
    "ShareGPT": _from_sharegpt, "Alpaca": _from_alpaca, "TRL": _from_trl,
}  # fmt: skip
