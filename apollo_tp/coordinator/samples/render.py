"""Text -> token ids with loss weights: the served tokenizer, its chat template, and what counts as an assistant turn.

Which tokens are learned from (weight > 0):

    context_ids + continuation_ids   the continuation
    prompt + completion              the completion's tokens, tokenised apart from the prompt's, and the end-of-text token
    text                             every token, and the end-of-text token
    messages                         what the model would have had to generate in each assistant turn: from behind the
                                     generation prompt to the end-of-turn token; white space behind that token is the
                                     template's, not the model's

With "append_eos": false there is no end-of-text token, and no second one behind a token that ends an answer. Nor is there a
second begin-of-text token before a prompt or text that begins with it. A token that begins before a span is context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Encoding

from apollo_tp.coordinator.samples.chat_messages import template_messages, template_tools
from apollo_tp.coordinator.samples.chat_template import Conversation, Template
from apollo_tp.coordinator.samples.schema import Message
from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, Serving, read_tokenizer


@dataclass(frozen=True)
class Chat:
    """A conversation as the client sent it."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Renderer:
    """The tokenizer and chat templates that the server uses, as it published them in ``folder``. Raises ConfigError saying
    why there is no tokenizer."""

    def __init__(self, serving: Serving, folder: Path) -> None:
        self._serving, self._tokenizer = serving, read_tokenizer(serving, folder)
        probe = self._tokenizer.encode("a", add_special_tokens=True)
        first = probe.special_tokens_mask.index(0) if 0 in probe.special_tokens_mask else 0
        self._prefix = list(probe.ids[:first])
        """What the tokenizer puts before a text by itself: a begin-of-text token, mostly."""
        # the post-processor adds special tokens and trims offsets: a chat rendering has its own special tokens, and the
        # spans need the offsets as they are
        self._tokenizer.post_processor = None
        assert serving.tokenizer is not None
        self.eos_id = serving.tokenizer.eos_id
        self._ends, self._refused = frozenset(serving.tokenizer.end_ids), serving.tokenizer.refused_tokens
        added = self._tokenizer.get_added_tokens_decoder()
        self._closing = {id: t.content for id, t in added.items() if t.special or id in self._ends}
        """Tokens that may close an assistant turn."""

    def encode(self, text: str, field: str = "text") -> list[int]:
        """Token ids of ``text`` alone, as the server makes them. Raises RequestError if they are not known."""
        return list(self._encoding(text, field).ids)

    def begun(self, text: str, field: str = "text") -> list[int]:
        """Token ids of ``text`` behind what the tokenizer puts before it, once: a rendered text may have that already."""
        ids = self.encode(text, field)
        return ids if self._prefix and ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _encoding(self, text: str, field: str) -> Encoding:
        for token in self._refused:
            if token in text:
                raise refuse(
                    field, f"a text with {token}", "one without, which alone this server's tokenizer treats apart"
                )
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> list[str]:
        """Each token as text, for showing."""
        return [self._tokenizer.decode([token], skip_special_tokens=False) for token in ids]

    def prompt_completion(self, prompt: str, completion: str, *, append_eos: bool) -> tuple[list[int], list[float]]:
        """Token ids and weights of a prompt and its completion; see the module docstring."""
        context, target = self.begun(prompt, "prompt"), self._ended(self.encode(completion, "completion"), append_eos)
        return context + target, [0.0] * len(context) + [1.0] * len(target)

    def text(self, text: str, *, append_eos: bool) -> tuple[list[int], list[float]]:
        """Token ids and weights of a plain text."""
        ids = self._ended(self.begun(text), append_eos)
        return ids, [0.0] + [1.0] * (len(ids) - 1) if ids else []

    def _ended(self, ids: list[int], append_eos: bool) -> list[int]:
        """With the end-of-text token, unless they end with a token that ends an answer (and white space) already."""
        last = max((index for index, token in enumerate(ids) if token in self._ends), default=None)
        if not append_eos or self.eos_id is None:
            return ids
        if last is not None and not self._tokenizer.decode(ids[last + 1 :], skip_special_tokens=False).strip():
            return ids
        return [*ids, self.eos_id]

    def chat(self, chat: Chat, weights: Sequence[float], most_tokens: int) -> tuple[list[int], list[float]]:
        """Token ids and weights of a conversation; ``weights`` has one number per assistant message.

        Raises RequestError if there is no template, it refuses the messages, they are more than ``most_tokens``, or an
        assistant turn of another weight than 0 cannot be told exactly.
        """
        template = self._template(chat)
        messages = template_messages(chat.messages, parts=template.parts, developer=template.knows_developer)
        conversation = Conversation(template, messages, self._variables(chat))
        try:
            conversation.text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, of an escape in a tool call's arguments
            raise refuse("messages", f"characters that are none ({error.reason})", "text") from error
        encoding = self._encoding(conversation.text, "messages")
        if len(encoding.ids) > most_tokens:  # before each turn is told, by as many renderings
            raise too_long("messages", len(encoding.ids), most_tokens)
        values = [0.0] * len(encoding.ids)
        turns = conversation.turns([weight > 0 for weight in weights])
        for (begin, end), weight in zip(turns, (weight for weight in weights if weight > 0), strict=True):
            if not conversation.marked:
                end = self._without_trailing_space(conversation.text, begin, end)
            for index, (first, last) in enumerate(encoding.offsets):
                # some tokens take the white space behind them with them
                inside = last <= end or (first < end and encoding.ids[index] in self._closing)
                if begin <= first and inside and first < last:
                    values[index] = weight
        return list(encoding.ids), values

    def _template(self, chat: Chat) -> Template:
        """The one that the server would take. Raises RequestError if there is none."""
        given = self._serving.chat if not chat.tools else self._serving.chat_with_tools
        if self._serving.chat_refusal or given is None:
            reason = self._serving.chat_refusal or "the served model has no chat template"
            raise refuse("messages", f"a conversation, but {reason}", "prompt + completion, text or token ids")
        try:
            return Template(given)
        except jinja2.TemplateSyntaxError as error:
            raise refuse("messages", f"a conversation for a template with an error ({error})", "a sound one") from error

    def _variables(self, chat: Chat) -> dict[str, Any]:
        """All but the messages. As in vLLM, null and "auto" leave the server's own value."""
        asked = {
            name: value for name, value in (chat.chat_template_kwargs or {}).items() if value not in (None, "auto")
        }
        for name in asked:
            if name in RESERVED_TEMPLATE_KWARGS:
                raise refuse(
                    f"chat_template_kwargs.{name}", "what vLLM does not hand to the template", "the template's own"
                )
        tools = template_tools(chat.tools) if chat.tools else None  # vLLM takes no empty list
        return {
            **self._serving.special_tokens,
            "documents": None,
            **self._serving.chat_template_kwargs,
            **asked,
            "tools": tools,
        }

    def _without_trailing_space(self, text: str, begin: int, end: int) -> int:
        body = text[begin:end].rstrip()
        return begin + len(body) if body.endswith(tuple(self._closing.values())) else end


def too_long(field: str, count: int, limit: int) -> RequestError:
    """Of a sample with ``count`` tokens."""
    return refuse(field, f"{count} tokens", f"at most {limit} (see 'truncate')", code="sequence_too_long")
