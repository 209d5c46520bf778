"""Messages and tools as vLLM hands them to a chat template: what is trained must be the text that is served."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from apollo_tp.coordinator.samples.schema import Message
from apollo_tp.errors import refuse

FUNCTION: dict[str, tuple[type, ...]] = {
    "name": (str,), "description": (str, type(None)), "parameters": (dict, type(None)), "strict": (bool, type(None))
}  # fmt: skip
BILLING_HEADER = "x-anthropic-billing-header"


def template_messages(messages: Sequence[Message], *, parts: bool, developer: bool) -> list[dict[str, Any]]:
    """What the template is given. ``parts``: contents as lists of parts; ``developer``: it knows that role, which otherwise
    becomes the system's, and with it all system messages one at the beginning. Assistant messages keep their order."""
    plain = [_message(message, f"messages[{index}]", parts=parts) for index, message in enumerate(messages)]
    if developer or all(message["role"] != "developer" for message in plain):
        return plain
    plain = [_of_the_system(message) if message["role"] == "developer" else message for message in plain]
    system = [message for message in plain if message["role"] == "system"]
    if len(system) == 1 and plain[0] is system[0]:
        return plain
    texts = [_joined(message["content"]) for message in system]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in plain if message["role"] != "system")]


def _of_the_system(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _message(message: Message, where: str, *, parts: bool) -> dict[str, Any]:
    """No weight, no absent fields, nothing that vLLM leaves out."""
    if message.role == "assistant" and message.content is None and not message.tool_calls:
        raise refuse(f"{where}.content", "an assistant message without content and tool calls", "either")
    contents = _contents(message, where, parts=parts)
    if message.role == "system" and contents and contents[0]["text"].startswith(BILLING_HEADER):
        raise refuse(f"{where}.content", f"a line {BILLING_HEADER}, which some releases of vLLM drop", "none")
    plain: dict[str, Any] = {"role": message.role}
    if not parts:
        contents = [part for part in contents if part["text"]]
    # templates take results of tools as strings
    plain["content"] = contents if parts and message.role != "tool" else _joined(contents)
    if message.role == "assistant":
        if message.tool_calls:
            calls = enumerate(message.tool_calls)
            plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in calls]
        reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
        if reasoning is not None:
            plain["reasoning"] = plain["reasoning_content"] = reasoning
    if message.role == "tool" and message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    if message.role == "developer":
        plain["tools"] = None
    return plain


def _contents(message: Message, where: str, *, parts: bool) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    contents = message.content or []
    for index, part in enumerate(contents):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise refuse(f"{where}.content[{index}]", "a content part that is not text", "text parts only")
        if parts and part.keys() - {"type", "text"}:
            raise refuse(
                f"{where}.content[{index}]", "further fields, which the template is given", "'type' and 'text'"
            )
    return [{"type": "text", "text": part["text"]} for part in contents]


def _joined(contents: list[dict[str, Any]] | str) -> str:
    return contents if isinstance(contents, str) else "\n".join(part["text"] for part in contents)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call with its fields in the order of vLLM's request, and arguments as an object: OpenAI sends its JSON."""
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
    function = _ordered(function | {"arguments": arguments}, ("arguments", "name"))
    return _ordered(call | {"function": function}, ("id", "function", "type"))


def _ordered(fields: dict[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: fields[name] for name in first if name in fields} | fields


def template_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools in the order and with the fields that vLLM's request has: what the client left out is there, as null."""
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise refuse(where, msgspec.json.encode(tool).decode()[:80], "type 'function' and an object 'function'")
    # of others, some releases of vLLM show the template nothing
    for fields, known, at in ((tool, {"type", "function"}, where), (function, FUNCTION.keys(), f"{where}.function")):
        if unknown := sorted(fields.keys() - known):
            raise refuse(f"{at}.{unknown[0]}"[:80], "an unknown field", f"one of {', '.join(known)}")
    for name, kinds in FUNCTION.items():
        if not isinstance(function.get(name), kinds):
            raise refuse(f"{where}.function.{name}", repr(function.get(name))[:80], kinds[0].__name__)
    shown = {name: function.get(name) for name in FUNCTION if name != "strict" or function.get(name) is not None}
    return {"type": "function", "function": shown}
