"""A conversation as vLLM renders it, and which characters of the text are assistant turns.

The trained text must be the served text, so messages and tools are given to the chat template in the form in which vLLM
gives them to it.

The assistant turns come from the template's own {% generation %} marks if it has them. Otherwise the conversation is
rendered again up to each turn, with and without it, and these must be how the full text begins; or with a mark after one
message, and that rendering without the mark must equal the full text, character by character. So a template that changes
earlier turns (drops their reasoning, trims them) is handled or refused; nothing is guessed. What a turn says must be in the
text (statements.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from apollo_tp.coordinator.samples import statements
from apollo_tp.coordinator.samples.long_conversation import MAX_RENDERED, LongConversation
from apollo_tp.coordinator.samples.messages import template_messages, template_tools
from apollo_tp.coordinator.samples.schema import Message
from apollo_tp.coordinator.samples.template import MARK, Span, Template, with_mark
from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, Serving

UNSUPPORTED_TEMPLATE = "unsupported_template"
"""Error code: the assistant turns cannot be located in the rendered text, or it does not show what they say."""


@dataclass(frozen=True)
class Chat:
    """A conversation as the client sent it."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Turns:
    """Assistant turns: ``spans`` of ``text``, in order."""

    text: str
    spans: list[Span]
    appended: str = ""
    """What the template adds after the last message and before the next one, if it ignores add_generation_prompt. The last
    span ends within it, at the end-of-turn token."""
    said: Sequence[statements.Said] = ()
    """What each of the spans says."""


class Conversation:
    """A conversation as the template is given it, and its rendered ``text``, which ends without a generation prompt.

    Raises RequestError if the server has no template, or the template refuses the messages.
    """

    def __init__(self, chat: Chat, serving: Serving) -> None:
        self._template = template = _template_of(chat, serving)
        self._sent = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
        self._messages = template_messages(chat.messages, template)
        self._variables = _variables(chat, serving)
        if MARK in json.dumps([self._messages, self._variables], ensure_ascii=False):
            raise refuse("messages", "apollo_tp's own mark in them", "messages without it")
        self.text = self._render(self._messages)
        marked = template.render(self._messages, self._variables, marks=True) if template.has_marks else ""
        self.marked = MARK in marked
        """Whether the template itself marks what the model generates."""
        self._marked_turns = self._spans_between_marks(marked) if self.marked else []

    def turns(self, wanted: Sequence[bool]) -> Turns:
        """The assistant messages that are ``wanted`` (one flag per assistant message).

        A span reaches from the end of the generation prompt to the end of the turn, white space included. Raises
        RequestError if a turn is empty, and with UNSUPPORTED_TEMPLATE if it cannot be located exactly, or is not shown
        completely.
        """
        assistants = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        for index, sent, asked in zip(assistants, self._sent, wanted, strict=True):
            if asked and statements.is_empty(self._messages[index]):
                raise refuse(
                    f"messages[{sent}].content",
                    "an empty assistant message to learn",
                    "content, tool calls, or weight 0",
                )
        learned = [index for index, asked in zip(assistants, wanted, strict=True) if asked]
        last = len(self._messages) - 1
        if learned == [last] and not self.marked and not self._shows_generated():
            return self._generated(self._prompt_of_last)
        spans = self._located(learned, wanted)
        self._check_shown(dict(zip(assistants, self._sent, strict=True)), dict(zip(learned, spans, strict=True)))
        said = [statements.said(self._messages[index]) for index in learned]
        return Turns(self.text, spans, self._appended(last) if last in learned and not self.marked else "", said)

    def with_prompt(self) -> str:
        """The text with the generation prompt at its end."""
        return self._render(self._messages, prompt=True)

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self._template.render(messages, self._variables, prompt=prompt)

    def _spans_between_marks(self, marked: str) -> list[Span]:
        parts, num_turns = marked.split(MARK), len(self._sent)
        if len(parts) != 2 * num_turns + 1:
            raise unsupported(f"the template marks {len(parts) // 2} generations in {num_turns} assistant turns")
        if "".join(parts) != self.text:
            raise unsupported("its text depends on its own marks")
        starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
        return [(starts[i], starts[i] + len(parts[i])) for i in range(1, len(parts), 2)]

    def _located(self, learned: Sequence[int], wanted: Sequence[bool]) -> list[Span]:
        if self.marked:
            return [turn for turn, asked in zip(self._marked_turns, wanted, strict=True) if asked]
        if 2 * sum(learned) <= MAX_RENDERED:
            return [self._turn(index) for index in learned]
        return LongConversation(self._messages, self.text, self._render, self._turn).locate(learned)

    def _check_shown(self, sent: dict[int, int], spans: dict[int, Span]) -> None:
        """Raise RequestError unless the text shows everything that the messages say. ``sent``: their positions as the client
        sent them."""
        turns = [(index, self.text[begin:end]) for index, (begin, end) in spans.items()]
        try:
            missing = statements.not_shown(self._messages, turns, self._render, self.text)
        except RequestError as error:
            raise unsupported(f"what it shows of them cannot be checked: {error}") from error
        if missing:
            index, what = missing
            raise unsupported(
                f"message {sent[index]}: the chat template does not show its {what}; if the model generates that as text, "
                "send it as the last message's content"
            )

    @functools.cached_property
    def _prompt_of_last(self) -> str:
        return self._render(self._messages[:-1], prompt=True)

    def _turn(self, index: int) -> Span:
        last = index == len(self._messages) - 1
        head = self._prompt_of_last if last else self._render(self._messages[:index], prompt=True)
        if not self.text.startswith(head):
            raise unsupported(
                f"message {index}: its generation prompt is not how the whole conversation begins; send the conversation up "
                "to each assistant message as a sample of its own, with weight 0 for the assistant messages before it"
            )
        prefix = self.text if last else self._render(self._messages[: index + 1])
        return len(head), len(prefix) if self.text.startswith(prefix) else self._marked_end(index)

    def _marked_end(self, index: int) -> int:
        """End of an assistant turn that later messages change: its content is marked in both renderings, and compared."""
        marked = [*self._messages]
        if (changed := with_mark(marked[index])) is None:
            raise unsupported(f"message {index}: later messages change how it is rendered, and it has no text content")
        marked[index] = changed
        full = self._render(marked).split(MARK)
        prefix = self._render(marked[: index + 1]).split(MARK)
        if len(full) != 2 or len(prefix) != 2 or "".join(full) != self.text or not full[1].startswith(prefix[1]):
            raise unsupported(f"message {index}: later messages change how it is rendered")
        return len(full[0]) + len(prefix[1])

    def _appended(self, index: int) -> str:
        """What the template adds after the last message ``index`` and what it adds after the messages before it have this
        end in common, if it does not depend on add_generation_prompt; else it is empty."""
        before, head = self._messages[:index], self._prompt_of_last
        if not before or not common_end(head, self.text).strip() or self._render(before) != head:
            return ""
        last, earlier = with_mark(self._messages[index]), with_mark(before[-1])
        if last is None or earlier is None:
            return ""
        after = [self._render(messages).rpartition(MARK)[2] for messages in ([*before, last], [*before[:-1], earlier])]
        return common_end(*after)

    def _shows_generated(self) -> bool:
        """Whether the text continues the last message's generation prompt, with the reasoning in its content."""
        prompt, content = self._prompt_of_last, self._messages[-1]["content"]
        reasoning = statements.reasoning_in(content) if isinstance(content, str) else ""
        return self.text.startswith(prompt) and reasoning.strip() in self.text[len(prompt) :]

    def _generated(self, prompt: str) -> Turns:
        """The last message's generation ``prompt`` and content, as the model generates it, where the template shows less.

        DeepSeek-R1's prompt begins the reasoning, and its template leaves it out of messages. Raises RequestError unless the
        content continues the prompt.
        """
        *earlier, last = self._messages
        before, mark, end = self._render([*earlier, last | {"content": MARK}]).partition(MARK)
        content = last["content"] if isinstance(last["content"], str) else ""
        shown = self.text[len(before) : len(self.text) - len(end)]
        whole = mark and MARK not in end and prompt.startswith(before) and self.text == before + shown + end
        if last.get("reasoning"):
            raise unsupported(
                "the last message's reasoning is not shown; send it in the content, as the model generates it"
            )
        if not whole or last.get("tool_calls") or not content.strip().endswith(shown.strip()):
            raise unsupported("the last message's generation prompt is not how the conversation with it begins")
        begun = prompt[len(before) :]
        if not content.startswith(begun):
            raise unsupported(
                f"the last message's generation prompt ends with {begun!r}, which the template leaves out of the message; "
                f"send the content as the model generates it, beginning with {begun!r}"
            )
        text = prompt + content[len(begun) :] + end
        return Turns(text, [(len(prompt), len(text))], said=[statements.said(last)])


def common_end(text: str, other: str) -> str:
    """The longest text with which both end."""
    most = min(len(text), len(other))
    length = next((n for n in range(most) if text[-n - 1] != other[-n - 1]), most)
    return text[len(text) - length :]


def unsupported(reason: str) -> RequestError:
    """The error for a conversation whose text is not what its assistant turns say, or not where."""
    return RequestError(
        f"messages: the assistant turns cannot be located exactly in what this chat template renders: {reason}. "
        "Use a template with {% generation %} marks that shows them, or send prompt + completion",
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
    tools = template_tools(chat.tools) if chat.tools else None  # vLLM passes no empty list
    return {**serving.special_tokens, "documents": None, **serving.chat_template_kwargs, **asked, "tools": tools}
