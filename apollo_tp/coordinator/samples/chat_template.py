"""A chat template, and which characters of what it renders are assistant turns.

They come from the template's own {% generation %} marks if it has them. Otherwise the conversation is rendered again with a
mark behind one message, and the rendering without the mark must equal the whole conversation's, character by character: so a
template that changes earlier turns (strips reasoning, trims) is handled or refused, never guessed.

The template runs in jinja2's immutable sandbox with the settings of transformers, which would cost seconds to import.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import ChatTemplate

MARK = "\u2063APOLLO\u2063MARK\u2063"  # invisible separators: in no vocabulary's templates, and checked to be unique
UNTELLABLE = "unsupported_template"
"""Code of an error: the assistant turns cannot be told."""
Span = tuple[int, int]


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, around what the template says the model generates: says nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface
    mark = ""

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return f"{self.mark}{caller()}{self.mark}"


class _MarkingTag(_GenerationTag):
    """Puts marks there."""

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
    """One to render with. ``parts``: it is given contents as lists of parts. Raises jinja2.TemplateSyntaxError."""

    def __init__(self, template: ChatTemplate) -> None:
        self.parts = template.parts
        self.knows_developer = any(
            role in template.text for role in ("'developer'", '"developer"')
        )  # as vLLM judges it
        self._plain = _compile(template.text, _GenerationTag)
        self._marking = _compile(template.text, _MarkingTag)

    def render(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], *, prompt: bool = False, marks: bool = False
    ) -> str:
        """Raises RequestError if the template refuses the messages."""
        compiled = self._marking if marks else self._plain
        try:
            return compiled.render(variables | {"messages": messages, "add_generation_prompt": prompt})
        # The template is a program of somebody else's, run on a client's values: whatever it raises is about those.
        except Exception as error:
            raise RequestError(
                f"messages: the chat template refused them: {error}", field="messages", got=str(error),
                expected="messages that the served model's chat template takes",
            ) from error  # fmt: skip


class Conversation:
    """Messages as the template gets them, and its other variables (tools, special tokens, the client's own).

    ``text`` is what the server would be asked with. Raises RequestError if there is none.
    """

    def __init__(self, template: Template, messages: list[dict[str, Any]], variables: dict[str, Any]) -> None:
        self._template, self._messages, self._variables = template, messages, variables
        if MARK in json.dumps([messages, variables], ensure_ascii=False):
            raise refuse("messages", "apollo_tp's own mark in them", "messages without it")
        self.text = self._render(messages)
        marked = template.render(messages, variables, marks=True)
        self.marked = MARK in marked
        """Whether the template says itself what the model generates."""
        self._marked_turns = self._marked(marked) if self.marked else []

    def turns(self, wanted: Sequence[bool]) -> list[Span]:
        """Of each assistant message that is ``wanted`` (one word for each): from behind the generation prompt to its end,
        white space included. Raises RequestError if it cannot be told exactly."""
        if self.marked:
            return [turn for turn, asked in zip(self._marked_turns, wanted, strict=True) if asked]
        return [self._turn(index) for index, asked in zip(self._assistants(), wanted, strict=True) if asked]

    def _assistants(self) -> list[int]:
        return [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self._template.render(messages, self._variables, prompt=prompt)

    def _marked(self, marked: str) -> list[Span]:
        parts, num_turns = marked.split(MARK), len(self._assistants())
        if len(parts) != 2 * num_turns + 1:
            raise _untellable(f"the template marks {len(parts) // 2} generations in {num_turns} assistant turns")
        if "".join(parts) != self.text:
            raise _untellable("what it renders depends on its own marks")
        starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
        return [(starts[i], starts[i] + len(parts[i])) for i in range(1, len(parts), 2)]

    def _turn(self, index: int) -> Span:
        head = self._render(self._messages[:index], prompt=True)
        if not self.text.startswith(head):
            raise _untellable(
                f"message {index}: its generation prompt is not how the whole conversation begins; send the conversation up "
                "to each assistant message as a sample of its own, with weight 0 for the assistant messages before it"
            )
        alone = self._render(self._messages[: index + 1])
        return len(head), len(alone) if self.text.startswith(alone) else self._marked_end(index)

    def _marked_end(self, index: int) -> int:
        """End of an assistant turn that later messages change: mark where its content ends, in both renderings."""
        marked = [*self._messages]
        marked[index] = _with_mark(marked[index], index)
        whole = self._render(marked).split(MARK)
        alone = self._render(marked[: index + 1]).split(MARK)
        if len(whole) != 2 or len(alone) != 2 or "".join(whole) != self.text or not whole[1].startswith(alone[1]):
            raise _untellable(f"message {index}: later messages change how it is rendered")
        return len(whole[0]) + len(alone[1])


def _with_mark(message: dict[str, Any], index: int) -> dict[str, Any]:
    """Behind the content; without one, behind the name of the last tool that is called."""
    content = message["content"]
    if content and isinstance(content, str):
        return message | {"content": content.rstrip() + MARK}
    if content:
        return message | {"content": [*content[:-1], content[-1] | {"text": content[-1]["text"].rstrip() + MARK}]}
    if not message.get("tool_calls"):
        raise _untellable(f"message {index}: later messages change how it is rendered, and it has no text content")
    *calls, last = message["tool_calls"]
    function = last["function"] | {"name": f"{last['function'].get('name')}{MARK}"}
    return message | {"tool_calls": [*calls, last | {"function": function}]}


def _untellable(reason: str) -> RequestError:
    return RequestError(
        f"messages: the assistant turns cannot be told exactly from this chat template: {reason}. "
        "Or use a template with {% generation %} marks, or send prompt + completion",
        field="messages",
        got=reason,
        expected="a conversation whose assistant turns the template renders in place",
        code=UNTELLABLE,
    )
