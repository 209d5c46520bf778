"""A chat template, and which characters of what it renders are assistant turns.

They come from the template's own {% generation %} marks if it has them. Otherwise the conversation is rendered again with a
mark behind one message, and the rendering without the mark must equal the whole conversation's, character by character: so a
template that changes earlier turns (strips reasoning, trims) is handled or refused, never guessed.

The template runs in jinja2's immutable sandbox with the settings of transformers, which would cost seconds to import.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from apollo_tp.errors import RequestError, refuse
from apollo_tp.manifest import ChatTemplate

MARK = "\u2063APOLLO\u2063MARK\u2063"  # invisible separators: in no vocabulary's templates, and checked to be unique
Span = tuple[int, int]


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: put marks around what the template says the model generates."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return f"{MARK}{caller()}{MARK}"


def _environment() -> jinja2.Environment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=8)
def _compile(text: str) -> jinja2.Template:
    return _environment().from_string(text)


class Template:
    """One to render with. ``parts``: it is given contents as lists of parts. Raises jinja2.TemplateSyntaxError."""

    def __init__(self, template: ChatTemplate) -> None:
        self.parts = template.parts
        self.knows_developer = any(
            role in template.text for role in ("'developer'", '"developer"')
        )  # as vLLM judges it
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", template.text) is not None
        self._compiled = _compile(template.text)

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any], *, prompt: bool) -> str:
        """Raises RequestError if the template refuses the messages."""
        try:
            return self._compiled.render(variables | {"messages": messages, "add_generation_prompt": prompt})
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RequestError(
                f"messages: the chat template refused them: {error}", field="messages", got=str(error),
                expected="messages that the served model's chat template takes",
            ) from error  # fmt: skip


@dataclass
class Conversation:
    """Messages as the template gets them, and its other variables (tools, special tokens, the client's own)."""

    template: Template
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    text: str = field(init=False)
    """What the server would be asked with."""
    turns: list[Span] = field(init=False)
    """Of each assistant message: from behind the generation prompt to its end, white space included."""

    def __post_init__(self) -> None:
        """Raises RequestError if the assistant turns cannot be told exactly."""
        if MARK in json.dumps([self.messages, self.variables], ensure_ascii=False):
            raise refuse("messages", "apollo_tp's own mark in them", "messages without it")
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        self.text = self._render(self.messages)
        if self.template.has_marks:
            self.text, self.turns = _marked(self.text, len(turns))
        else:
            self.turns = [self._turn(index) for index in turns]

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self.template.render(messages, self.variables, prompt=prompt)

    def _turn(self, index: int) -> Span:
        head = self._render(self.messages[:index], prompt=True)
        if not self.text.startswith(head):
            raise _untellable(f"message {index}: its generation prompt is not how the whole conversation begins")
        alone = self._render(self.messages[: index + 1])
        return len(head), len(alone) if self.text.startswith(alone) else self._marked_end(index)

    def _marked_end(self, index: int) -> int:
        """End of an assistant turn that later messages change: mark where its content ends, in both renderings."""
        marked = [*self.messages]
        marked[index] = marked[index] | {"content": _with_mark(marked[index]["content"], index)}
        whole = self._render(marked).split(MARK)
        alone = self._render(marked[: index + 1]).split(MARK)
        if len(whole) != 2 or len(alone) != 2 or "".join(whole) != self.text or not whole[1].startswith(alone[1]):
            raise _untellable(f"message {index}: later messages change how it is rendered")
        return len(whole[0]) + len(alone[1])


def _with_mark(content: str | list[dict[str, Any]], index: int) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content.rstrip() + MARK
    if not content:
        raise _untellable(f"message {index}: later messages change how it is rendered, and it has no text content")
    return [*content[:-1], content[-1] | {"text": content[-1]["text"].rstrip() + MARK}]


def _marked(text: str, num_turns: int) -> tuple[str, list[Span]]:
    """The text without the template's own marks, and what is between them."""
    parts = text.split(MARK)
    if len(parts) != 2 * num_turns + 1:
        raise _untellable(f"the template marks {len(parts) // 2} generations in {num_turns} assistant turns")
    starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
    return "".join(parts), [(starts[i], starts[i] + len(parts[i])) for i in range(1, len(parts), 2)]


def _untellable(reason: str) -> RequestError:
    return RequestError(
        f"messages: the assistant turns cannot be told exactly from this chat template: {reason}. "
        "Use a template with {% generation %} marks, or send prompt + completion",
        field="messages",
        got=reason,
        expected="a conversation whose assistant turns the template renders in place",
        code="unsupported_template",
    )
