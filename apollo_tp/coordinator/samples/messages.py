"""Messages and tools in the form in which vLLM gives them to a chat template, or refused where its releases differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from apollo_tp.coordinator.samples.lines import malformed
from apollo_tp.coordinator.samples.schema import Message, is_absent
from apollo_tp.coordinator.samples.template import Template
from apollo_tp.coordinator.samples.unique_keys import check_unique_keys
from apollo_tp.errors import DECODE_ERRORS, RequestError, refuse

BILLING_HEADER = "x-anthropic-billing-header"
FUNCTION: dict[str, tuple[type, ...]] = {
    "name": (str,), "description": (str, type(None)), "parameters": (dict, type(None)), "strict": (bool, type(None))
}  # fmt: skip
"""Fields of a tool's function, and their types."""


ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
OTHER_ROLES = {
    "function": "tool", "human": "user", "ai": "assistant", "bot": "assistant", "chatbot": "assistant", "gpt": "assistant",
    "model": "assistant",
}  # fmt: skip
"""Roles of other formats, and those that are meant. Templates may contain such a name as what they render."""
NOT_RENDERED = {
    "function_call": "the call in 'tool_calls', and its result with role 'tool'",
    "refusal": "its text in 'content'",
}
"""Fields of OpenAI's assistant messages that vLLM does not give to the template, and what to send instead."""
ROLE_OF = {
    "tool_calls": "assistant",
    "reasoning": "assistant",
    "reasoning_content": "assistant",
    "tool_call_id": "tool",
}
"""Fields that are given to the template for one role alone."""


def template_messages(messages: Sequence[Message], template: Template) -> list[dict[str, Any]]:
    """The messages as ``template`` is given them. Assistant messages keep their order. Raises RequestError.

    If the template does not know the role "developer", this becomes "system", and all system messages are merged into one at
    the beginning.
    """
    for index, message in enumerate(messages):
        _check_role(message.role, f"messages[{index}].role", template)
    plain = [_message(message, f"messages[{index}]", parts=template.parts) for index, message in enumerate(messages)]
    if template.names("developer") or all(message["role"] != "developer" for message in plain):
        return plain
    plain = [_as_system(message) if message["role"] == "developer" else message for message in plain]
    system = [message for message in plain if message["role"] == "system"]
    if len(system) == 1 and plain[0] is system[0]:
        return plain
    texts = [_joined(message["content"]) for message in system]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in plain if message["role"] != "system")]


def meant_role(role: str) -> str | None:
    """The role that is meant by one that is written otherwise, or as in other formats; None if that is not known."""
    plain = role.strip().lower()
    return OTHER_ROLES.get(plain) or (plain if plain in ROLES else None)


def unknown_role(role: str, where: str) -> RequestError:
    """The refusal of ``role``, with the one that is meant."""
    meant = meant_role(role)
    expected = repr(meant) if meant else "a role that the chat template names"
    return refuse(where, repr(role), f"{expected}; known are {', '.join(sorted(ROLES))}")


def _check_role(role: str, where: str, template: Template) -> None:
    """A template may render a role that it does not know as if it were one that it knows."""
    if role not in ROLES and (meant_role(role) or not template.names(role)):
        raise unknown_role(role, where)


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _message(message: Message, where: str, *, parts: bool) -> dict[str, Any]:
    """One message without its weight, absent fields, and fields that vLLM leaves out."""
    _check_fields(message, where)
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
        given = (message.reasoning, message.reasoning_content)
        reasoning = next((text for text in given if text), next((text for text in given if text is not None), None))
        if reasoning is not None:
            plain["reasoning"] = plain["reasoning_content"] = reasoning
    if message.role == "tool" and message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    if message.role == "developer":
        plain["tools"] = None
    return plain


def _check_fields(message: Message, where: str) -> None:
    """Refuse what the template would not be given."""
    for name, instead in NOT_RENDERED.items():
        if not is_absent(getattr(message, name)):
            raise refuse(f"{where}.{name}", "what the server's chat template is not given", instead)
    for name, role in ROLE_OF.items():
        if getattr(message, name) and message.role != role:
            raise refuse(f"{where}.{name}", f"it in a message of role {message.role!r}", f"it only with role {role!r}")
    reasonings = {text for text in (message.reasoning, message.reasoning_content) if text}
    if len(reasonings) > 1:
        raise refuse(f"{where}.reasoning_content", "another text than in 'reasoning'", "one of them")
    if message.role == "assistant" and message.content is None and not message.tool_calls and not reasonings:
        raise refuse(f"{where}.content", "an assistant message without content and tool calls", "either")


def _contents(message: Message, where: str, *, parts: bool) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    contents = message.content or []
    for index, part in enumerate(contents):
        at = f"{where}.content[{index}]"
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise refuse(at, f"a part of type {part.get('type')!r}"[:80], "type 'text' and a string 'text'")
        for name, value in part.items():
            if name not in ("type", "text") and not is_absent(value):
                raise refuse(f"{at}.{name}"[:80], "a field that the template is not given", "'type' and 'text' alone")
    return [{"type": "text", "text": part["text"]} for part in contents]


def _joined(contents: list[dict[str, Any]] | str) -> str:
    return contents if isinstance(contents, str) else "\n".join(part["text"] for part in contents)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call with its fields in the order of vLLM's request, and its arguments as an object; OpenAI's are JSON text."""
    function = call.get("function")
    if (call.get("type") or "function") != "function" or not isinstance(function, dict):
        raise refuse(where, "another kind of call", "type 'function' and an object 'function'")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise refuse(f"{where}.function.name", repr(name)[:80], "the name of a function")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    function = _ordered(function | {"arguments": arguments}, ("arguments", "name"))
    return _ordered(
        call | {"function": function} | ({"type": "function"} if "type" in call else {}), ("id", "function", "type")
    )


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """A call's arguments as an object."""
    if arguments in (None, "", [], {}):
        return {}
    reason = ""
    if isinstance(arguments, str):
        check_unique_keys(arguments.encode(), f"{where}.")
        try:
            arguments = msgspec.json.decode(arguments)
        except DECODE_ERRORS as error:
            reason = f" ({malformed(arguments.encode()) or error})"
    if not isinstance(arguments, dict):
        # vLLM renders {} instead, so that a running conversation can continue; that must not be learned
        raise refuse(where, f"{arguments!r:.80}{reason}", "a JSON object, or its text")
    return arguments


def _ordered(fields: dict[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: fields[name] for name in first if name in fields} | fields


def template_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools with the fields of vLLM's request, in its order; fields that the client left out are null."""
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise refuse(where, msgspec.json.encode(tool).decode()[:80], "type 'function' and an object 'function'")
    # some releases of vLLM do not pass unknown fields to the template
    for fields, known, at in ((tool, {"type", "function"}, where), (function, FUNCTION.keys(), f"{where}.function")):
        if unknown := sorted(fields.keys() - known):
            raise refuse(f"{at}.{unknown[0]}"[:80], "an unknown field", f"one of {', '.join(known)}")
    for name, kinds in FUNCTION.items():
        if not isinstance(function.get(name), kinds):
            raise refuse(f"{where}.function.{name}", repr(function.get(name))[:80], kinds[0].__name__)
    shown = {name: function.get(name) for name in FUNCTION if name != "strict" or function.get(name) is not None}
    return {"type": "function", "function": shown}
