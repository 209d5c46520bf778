"""Text -> token ids with loss weights: the served tokenizer, its chat template, and what counts as an assistant turn.

Which tokens are learned from (weight > 0):

    context_ids + continuation_ids   the continuation
    prompt + completion              the completion's tokens, tokenised apart from the prompt's, and the end-of-text token
    text                             every token, and the end-of-text token (none with "append_eos": false)
    messages                         what the model would have had to generate in each assistant turn: from behind the
                                     generation prompt to the end-of-turn token; white space behind that token is the
                                     template's, not the model's

A token that begins before a span is context.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from apollo_tp.coordinator.samples.chat_messages import template_messages, template_tools
from apollo_tp.coordinator.samples.chat_template import Conversation, Template
from apollo_tp.coordinator.samples.schema import Message
from apollo_tp.errors import ConfigError, RequestError, refuse
from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, ChatTemplate, Serving


@dataclass(frozen=True)
class Chat:
    """A conversation as the client sent it."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Renderer:
    """The tokenizer and chat templates that the server uses: ``folder`` is the tokenizer's, if it is not the model's;
    ``serving`` is what the server said of its templates, without which they are the folder's. Raises ConfigError if there is
    no tokenizer.json."""

    def __init__(self, model_path: Path, folder: Path | None = None, serving: Serving | None = None) -> None:
        folder = folder or model_path
        tokenizer_file = folder / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise ConfigError(f"{folder}: got no tokenizer.json, expected one; only token ids can be trained on")
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        # a second one without the post-processor, which adds special tokens and trims offsets: a chat rendering has its
        # own special tokens, and the spans need the offsets as they are
        self._bare = Tokenizer.from_file(str(tokenizer_file))
        self._bare.post_processor = None
        for tokenizer in (self._tokenizer, self._bare):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        self._told, self._serving = serving is not None, serving or _folder_serving(folder, config)
        self._special = self._serving.special_tokens or _folder_special_tokens(config)
        self._added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self.eos_id = self._eos(model_path)

    def _eos(self, model_path: Path) -> int | None:
        if "eos_token" in self._special:
            return self._tokenizer.token_to_id(self._special["eos_token"])
        eos = _read_json(model_path / "config.json").get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        return eos if isinstance(eos, int) else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; ``special`` adds what the tokenizer puts around a text by itself (a BOS token, for example)."""
        return list((self._tokenizer if special else self._bare).encode(text, add_special_tokens=special).ids)

    def decode(self, ids: list[int]) -> list[str]:
        """Each token as text, for showing."""
        return [self._tokenizer.decode([token], skip_special_tokens=False) for token in ids]

    def prompt_completion(self, prompt: str, completion: str, *, append_eos: bool) -> tuple[list[int], list[float]]:
        """Token ids and weights of a prompt and its completion; see the module docstring."""
        context = self.encode(prompt, special=True)
        if context and context[-1] == self.eos_id and prompt:
            context.pop()  # some tokenizers end every text; this one goes on
        target = self.encode(completion, special=False) + self._end(append_eos)
        return context + target, [0.0] * len(context) + [1.0] * len(target)

    def text(self, text: str, *, append_eos: bool) -> tuple[list[int], list[float]]:
        """Token ids and weights of a plain text."""
        ids = self.encode(text, special=True)
        if not ids or ids[-1] != self.eos_id:
            ids += self._end(append_eos)
        return ids, [0.0] + [1.0] * (len(ids) - 1) if ids else []

    def _end(self, append_eos: bool) -> list[int]:
        return [self.eos_id] if append_eos and self.eos_id is not None else []

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
        encoding = self._bare.encode(conversation.text, add_special_tokens=False)
        if len(encoding.ids) > most_tokens:  # before each turn is told, by as many renderings
            raise too_long("messages", len(encoding.ids), most_tokens)
        values = [0.0] * len(encoding.ids)
        turns = conversation.turns([weight > 0 for weight in weights])
        for (begin, end), weight in zip(turns, (weight for weight in weights if weight > 0), strict=True):
            if not conversation.marked:
                end = self._without_trailing_space(conversation.text, begin, end)
            for index, (first, last) in enumerate(encoding.offsets):
                if begin <= first and last <= end and first < last:
                    values[index] = weight
        return list(encoding.ids), values

    def _template(self, chat: Chat) -> Template:
        """The one that the server would take. Raises RequestError if there is none."""
        if not self._told and any(isinstance(m.content, list) and len(m.content) > 1 for m in chat.messages):
            raise refuse(
                "messages", "several content parts, but no server that said how it joins them", "one text each"
            )
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
        return {**self._special, "documents": None, **self._serving.chat_template_kwargs, **asked, "tools": tools}

    def _without_trailing_space(self, text: str, begin: int, end: int) -> int:
        body = text[begin:end].rstrip()
        return begin + len(body) if body.endswith(tuple(self._added)) and self._added else end


def too_long(field: str, count: int, limit: int) -> RequestError:
    """Of a sample with ``count`` tokens."""
    return refuse(field, f"{count} tokens", f"at most {limit} (see 'truncate')", code="sequence_too_long")


def _folder_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    return {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }


def _folder_serving(folder: Path, config: dict[str, Any]) -> Serving:
    """The templates of the tokenizer's folder, where transformers finds them."""
    source = config.get("chat_template")
    named = {entry["name"]: entry["template"] for entry in source} if isinstance(source, list) else {"default": source}
    for file in (folder / "additional_chat_templates").glob("*.jinja"):
        named[file.stem] = file.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        named["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    default, tool_use = (ChatTemplate(text=text) if isinstance(text, str) else None
                         for text in (named.get("default"), named.get("tool_use")))  # fmt: skip
    return Serving(chat=default, chat_with_tools=tool_use or default)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
