"""A conversation as vLLM renders it, and which characters of the text are assistant turns.

The trained text must be the served text, so messages and tools are given to the chat template in the form in which vLLM
gives them to it. The template runs in jinja2's immutable sandbox with the settings of transformers, whose import would
take seconds.

The assistant turns come from the template's own {% generation %} marks if it has them. Otherwise the conversation is
rendered again with a mark after one message, and that rendering without the mark must equal the full text, character by
character. So a template that changes earlier turns (drops their reasoning, trims them) is handled or refused; nothing
is guessed.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec

from apollo_tp.coordinator.samples.schema import Message
from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, ChatTemplate, Serving

MARK = "\u2063APOLLO\u2063MARK\u2063"  # invisible separators, which no template contains; requests with it are refused
UNSUPPORTED_TEMPLATE = "unsupported_template"
"""Error code: the assistant turns cannot be located in the rendered text."""
BILLING_HEADER = "x-anthropic-billing-header"
FUNCTION: dict[str, tuple[type, ...]] = {
    "name": (str,), "description": (str, type(None)), "parameters": (dict, type(None)), "strict": (bool, type(None))
}  # fmt: skip
"""Fields of a tool's function, and their types."""
Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Chat:
    """A conversation as the client sent it."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Conversation:
    """A conversation as the template is given it, and its rendered ``text``, which ends without a generation prompt.

    Raises RequestError if the server has no template, or the template refuses the messages.
    """

    def __init__(self, chat: Chat, serving: Serving) -> None:
        self._template = template = _template_of(chat, serving)
        self._messages = _messages(chat.messages, parts=template.parts, developer=template.knows_developer)
        self._variables = _variables(chat, serving)
        if MARK in json.dumps([self._messages, self._variables], ensure_ascii=False):
            raise refuse("messages", "apollo_tp's own mark in them", "messages without it")
        self.text = self._render(self._messages)
        marked = template.render(self._messages, self._variables, marks=True)
        self.marked = MARK in marked
        """Whether the template itself marks what the model generates."""
        self._marked_turns = self._spans_between_marks(marked) if self.marked else []

    def turns(self, wanted: Sequence[bool]) -> list[Span]:
        """The span of each assistant message that is ``wanted`` (one flag per assistant message).

        It reaches from the end of the generation prompt to the end of the turn, white space included. Raises RequestError
        (UNSUPPORTED_TEMPLATE) if it cannot be located exactly.
        """
        if self.marked:
            return [turn for turn, asked in zip(self._marked_turns, wanted, strict=True) if asked]
        return [self._turn(index) for index, asked in zip(self._assistants(), wanted, strict=True) if asked]

    def _assistants(self) -> list[int]:
        return [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self._template.render(messages, self._variables, prompt=prompt)

    def _spans_between_marks(self, marked: str) -> list[Span]:
        parts, num_turns = marked.split(MARK), len(self._assistants())
        if len(parts) != 2 * num_turns + 1:
            raise _unsupported(f"the template marks {len(parts) // 2} generations in {num_turns} assistant turns")
        if "".join(parts) != self.text:
            raise _unsupported("its text depends on its own marks")
        starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
        return [(starts[i], starts[i] + len(parts[i])) for i in range(1, len(parts), 2)]

    def _turn(self, index: int) -> Span:
        head = self._render(self._messages[:index], prompt=True)
        if not self.text.startswith(head):
            raise _unsupported(
                f"message {index}: its generation prompt is not how the whole conversation begins; send the conversation up "
                "to each assistant message as a sample of its own, with weight 0 for the assistant messages before it"
            )
        prefix = self._render(self._messages[: index + 1])
        return len(head), len(prefix) if self.text.startswith(prefix) else self._marked_end(index)

    def _marked_end(self, index: int) -> int:
        """End of an assistant turn that later messages change: its content is marked in both renderings, and compared."""
        marked = [*self._messages]
        marked[index] = _with_mark(marked[index], index)
        full = self._render(marked).split(MARK)
        prefix = self._render(marked[: index + 1]).split(MARK)
        if len(full) != 2 or len(prefix) != 2 or "".join(full) != self.text or not full[1].startswith(prefix[1]):
            raise _unsupported(f"message {index}: later messages change how it is rendered")
        return len(full[0]) + len(prefix[1])


class _GenerationTag(jinja2.ext.Extension):
    """Jinja extension: replaces {% generation %} blocks, around what the model generates, by their content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface
    mark = ""

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return f"{self.mark}{caller()}{self.mark}"


class _MarkingTag(_GenerationTag):
    """Jinja extension: replaces {% generation %} blocks by their content between two marks."""

    mark = MARK


def _environment(tag: type[_GenerationTag]) -> jinja2.Environment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[tag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=16)
def _compile(text: str, tag: type[_GenerationTag]) -> jinja2.Template:
    return _environment(tag).from_string(text)


class Template:
    """A compiled chat template. Raises jinja2.TemplateSyntaxError.

    ``parts``: message contents are passed as lists of content parts (OpenAI's form), not as strings.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.parts = template.parts
        # vLLM decides it in the same way
        self.knows_developer = any(role in template.text for role in ("'developer'", '"developer"'))
        self._plain = _compile(template.text, _GenerationTag)
        self._marking = _compile(template.text, _MarkingTag)

    def render(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], *, prompt: bool = False, marks: bool = False
    ) -> str:
        """The text; ``prompt`` adds the generation prompt. Raises RequestError if the template refuses the messages."""
        compiled = self._marking if marks else self._plain
        try:
            return compiled.render(variables | {"messages": messages, "add_generation_prompt": prompt})
        # The template is a foreign program that runs on a client's values: whatever it raises concerns these.
        except Exception as error:
            raise RequestError(
                f"messages: the chat template refused them: {error}", field="messages", got=str(error),
                expected="messages that the served model's chat template takes",
            ) from error  # fmt: skip


def _with_mark(message: dict[str, Any], index: int) -> dict[str, Any]:
    """The message with a mark after its content or, without content, after the name of its last tool call."""
    content = message["content"]
    if content and isinstance(content, str):
        return message | {"content": content.rstrip() + MARK}
    if content:
        return message | {"content": [*content[:-1], content[-1] | {"text": content[-1]["text"].rstrip() + MARK}]}
    if not message.get("tool_calls"):
        raise _unsupported(f"message {index}: later messages change how it is rendered, and it has no text content")
    *calls, last = message["tool_calls"]
    function = last["function"] | {"name": f"{last['function'].get('name')}{MARK}"}
    return message | {"tool_calls": [*calls, last | {"function": function}]}


def _unsupported(reason: str) -> RequestError:
    return RequestError(
        f"messages: the assistant turns cannot be located exactly in what this chat template renders: {reason}. "
        "Or use a template with {% generation %} marks, or send prompt + completion",
        field="messages",
        got=reason,
        expected="a conversation whose assistant turns the template renders in place",
        code=UNSUPPORTED_TEMPLATE,
    )


def _template_of(chat: Chat, serving: Serving) -> Template:
    """The template that the server would use. Raises RequestError if there is none."""
    given = serving.chat if not chat.tools else serving.chat_with_tools
    if serving.chat_refusal or given is None:
        reason = serving.chat_refusal or "the served model has no chat template"
        raise refuse("messages", f"a conversation, but {reason}", "prompt + completion, text or token ids")
    try:
        return Template(given)
    except jinja2.TemplateSyntaxError as error:
        raise refuse("messages", f"a conversation for a template with an error ({error})", "a sound one") from error


def _variables(chat: Chat, serving: Serving) -> dict[str, Any]:
    """The template's variables without the messages. As in vLLM, null and "auto" leave the server's own value."""
    asked = {name: value for name, value in (chat.chat_template_kwargs or {}).items() if value not in (None, "auto")}
    for name in asked:
        if name in RESERVED_TEMPLATE_KWARGS:
            raise refuse(
                f"chat_template_kwargs.{name}", "what vLLM does not pass to the template", "a variable of the template"
            )
    tools = _tools(chat.tools) if chat.tools else None  # vLLM passes no empty list
    return {**serving.special_tokens, "documents": None, **serving.chat_template_kwargs, **asked, "tools": tools}


def _messages(messages: Sequence[Message], *, parts: bool, developer: bool) -> list[dict[str, Any]]:
    """The messages as the template is given them. Assistant messages keep their order.

    ``parts``: contents are lists of parts. ``developer``: the template knows this role. Otherwise it becomes the role
    "system", and all system messages are merged into one at the beginning.
    """
    plain = [_message(message, f"messages[{index}]", parts=parts) for index, message in enumerate(messages)]
    if developer or all(message["role"] != "developer" for message in plain):
        return plain
    plain = [_as_system(message) if message["role"] == "developer" else message for message in plain]
    system = [message for message in plain if message["role"] == "system"]
    if len(system) == 1 and plain[0] is system[0]:
        return plain
    texts = [_joined(message["content"]) for message in system]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in plain if message["role"] != "system")]


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _message(message: Message, where: str, *, parts: bool) -> dict[str, Any]:
    """One message without its weight, absent fields, and fields that vLLM leaves out."""
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
                f"{where}.content[{index}]", "further fields, which the template would be given", "'type' and 'text'"
            )
    return [{"type": "text", "text": part["text"]} for part in contents]


def _joined(contents: list[dict[str, Any]] | str) -> str:
    return contents if isinstance(contents, str) else "\n".join(part["text"] for part in contents)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call with its fields in the order of vLLM's request, and its arguments as an object; OpenAI's are JSON text."""
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise refuse(where, "another kind of call", "type 'function' and an object 'function'")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(
            ValueError, RecursionError
        ):  # text that is not JSON stays a string, and is refused below
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        # vLLM renders {} instead, so that a running conversation can continue; that must not be learned
        raise refuse(f"{where}.function.arguments", repr(arguments)[:80], "a JSON object, or its text")
    function = _ordered(function | {"arguments": arguments}, ("arguments", "name"))
    return _ordered(call | {"function": function}, ("id", "function", "type"))


def _ordered(fields: dict[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: fields[name] for name in first if name in fields} | fields


def _tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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
