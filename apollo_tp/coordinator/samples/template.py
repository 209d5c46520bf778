"""A chat template, compiled in jinja2's immutable sandbox with the settings of transformers, whose import would take
seconds."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from apollo_tp.errors import RequestError
from apollo_tp.shards.serving import ChatTemplate

MARK = "\u2063APOLLO\u2063MARK\u2063"  # invisible separators, which no template contains; requests with it are refused
Span = tuple[int, int]
"""First character, and the one after the last."""


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
        self._text = template.text
        self.has_marks = "generation" in template.text.replace("add_generation_prompt", "")
        """Whether it may have {% generation %} blocks."""
        self._plain = _compile(template.text, _GenerationTag)
        self._marking = _compile(template.text, _MarkingTag)

    def names(self, role: str) -> bool:
        """Whether its text contains the quoted name of ``role``, by which vLLM decides about the role "developer"."""
        return f"'{role}'" in self._text or f'"{role}"' in self._text

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


def with_mark(message: dict[str, Any]) -> dict[str, Any] | None:
    """The message with a mark after its content or, without content, after the name of its last tool call; None without
    either."""
    content = message["content"]
    if content and isinstance(content, str):
        return message | {"content": _with_mark_at_end(content)}
    if content:
        return message | {"content": [*content[:-1], content[-1] | {"text": _with_mark_at_end(content[-1]["text"])}]}
    if not message.get("tool_calls"):
        return None
    *calls, last = message["tool_calls"]
    function = last["function"] | {"name": f"{last['function'].get('name')}{MARK}"}
    return message | {"tool_calls": [*calls, last | {"function": function}]}


def _with_mark_at_end(text: str) -> str:
    """White space stays behind the mark, since templates remove it at the end."""
    end = len(text.rstrip())
    return text[:end] + MARK + text[end:]


def between_marks(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark before and after its content; white space stays outside."""
    content = message["content"]
    if isinstance(content, str):
        text = content.strip()
        begin = content.index(text)
        return message | {"content": content[:begin] + MARK + text + MARK + content[begin + len(text) :]}
    if not content:
        return message
    parts = [content[0] | {"text": MARK + content[0]["text"]}, *content[1:]]
    parts[-1] = parts[-1] | {"text": parts[-1]["text"] + MARK}
    return message | {"content": parts}
