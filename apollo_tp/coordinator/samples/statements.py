"""What an assistant message says (reasoning, content, tool calls), and whether the rendered text shows it.

A template may leave out what it does not know, and the turn that would be learned would then be another one. Contents and
reasoning are looked for in the turn's text. What is not found there as it is, and tool calls, get a word each in one more
rendering, which must show all of these words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

END_OF_REASONING = "</think>"
Render = Callable[[list[dict[str, Any]]], str]
Part = tuple[int, str]
"""The position of a message, and a part of it in words."""


def is_empty(message: dict[str, Any]) -> bool:
    """Whether the message has no text, no reasoning and no tool call."""
    return not message.get("tool_calls") and not any(text.strip() for _, text in _texts(message))


def not_shown(
    messages: list[dict[str, Any]], turns: Iterable[tuple[int, str]], render: Render, text: str
) -> Part | None:
    """A part of a message that the rendered ``text`` of ``messages`` does not show; None if it shows all.

    ``turns``: the position of each learned message, and its turn's text. Raises RequestError if the template refuses the
    messages with words added to them.
    """
    words, marked = _Words(text), [*messages]
    for index, turn in turns:
        message = messages[index]
        if message.get("tool_calls") or any(part.strip() not in turn for _, part in _texts(message)):
            marked[index] = _with_words(message, index, words)
    shown = render(marked) if words.parts else ""
    return next((part for word, part in words.parts.items() if word not in shown), None)


class _Words:
    """Words that ``text`` does not contain, and to which part each was added."""

    def __init__(self, text: str) -> None:
        self._stem = "apolloword"
        while self._stem in text:
            self._stem += "x"
        self.parts: dict[str, Part] = {}

    def new(self, part: Part) -> str:
        word = f"{self._stem}{len(self.parts)}e"
        self.parts[word] = part
        return word

    def after(self, text: str, part: Part) -> str:
        """``text`` with a word at its end, unless it is empty."""
        return text.rstrip() + self.new(part) if text.strip() else text


def _texts(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Reasoning and content, which may begin with reasoning of its own."""
    yield "reasoning", message.get("reasoning") or ""
    content = message["content"]
    for text in [content] if isinstance(content, str) else [part["text"] for part in content]:
        yield "reasoning", reasoning_in(text)
        yield "content", divided(text)[2]


def divided(content: str) -> tuple[str, str, str]:
    """Reasoning, the tag after it, and the rest; the first two are empty without that tag."""
    reasoning, tag, answer = content.partition(END_OF_REASONING)
    return (reasoning, tag, answer) if tag else ("", "", content)


def reasoning_in(content: str) -> str:
    """The reasoning with which a content begins, without its tags, of which the first one may be in the prompt."""
    return divided(content)[0].replace("<think>", "", 1)


class Said(NamedTuple):
    """What a message says: ``all`` of it as JSON, and its ``last`` words, which are the name of its last tool call if it has
    one."""

    all: str
    last: str


def said(message: dict[str, Any]) -> Said:
    """What ``message`` says."""
    calls = message.get("tool_calls")
    last = calls[-1]["function"]["name"] if calls else [text for _, text in _texts(message)][-1].strip()
    return Said(json.dumps(message, ensure_ascii=False), last)


def _with_words(message: dict[str, Any], index: int, words: _Words) -> dict[str, Any]:
    """``message`` with a word at the end of each part that says something."""

    def text(content: str) -> str:
        reasoning, tag, answer = divided(content)
        if reasoning_in(content).strip():
            reasoning = words.after(reasoning, (index, "reasoning"))
        return reasoning + tag + words.after(answer, (index, "content"))

    content = message["content"]
    content = text(content) if isinstance(content, str) else [part | {"text": text(part["text"])} for part in content]
    changed = message | {"content": content}
    if "reasoning" in message:
        changed["reasoning"] = words.after(message["reasoning"], (index, "reasoning"))
        changed["reasoning_content"] = changed["reasoning"]
    if "tool_calls" in message:
        changed["tool_calls"] = [_call_with_words(call, index, words) for call in message["tool_calls"]]
    return changed


def _call_with_words(call: dict[str, Any], index: int, words: _Words) -> dict[str, Any]:
    function = call["function"] | {"name": f"{call['function'].get('name')}{words.new((index, 'tool calls'))}"}
    if arguments := function["arguments"]:
        function["arguments"] = arguments | {words.new((index, "tool calls' arguments")): ""}
    return call | {"function": function}
