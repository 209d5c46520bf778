"""Messages and tools as vLLM hands them to a chat template: what is trained must be the text that is served."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from apollo_tp.coordinator.schema import Message
from apollo_tp.errors import refuse


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
    contents = _contents(message)
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


def _contents(message: Message) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    contents = message.content or []
    if not all(isinstance(part.get("text"), str) for part in contents):
        raise refuse("messages", "a content part that is not text", "text parts only")
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
    given: dict[str, Any] = {name: call[name] for name in ("id", "function", "type") if name in call}
    named = {"name": function["name"]} if "name" in function else {}
    return given | {"function": {"arguments": arguments} | named}


def template_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools in the order and with the fields that vLLM's request has: what the client left out is there, as null."""
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise refuse(where, msgspec.json.encode(tool).decode()[:80], "type 'function' and an object 'function'")
    if not isinstance(function.get("name"), str):
        raise refuse(f"{where}.function.name", repr(function.get("name"))[:80], "a string")
    shown = {name: function.get(name) for name in ("name", "description", "parameters")}
    marks = {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
    return {"type": "function", "function": shown | marks}
