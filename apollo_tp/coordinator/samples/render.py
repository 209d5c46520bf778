"""Text -> token ids with loss weights: the served tokenizer, its chat template, and what counts as an assistant turn.

Which tokens are learned from (weight > 0):

    context_ids + continuation_ids   the continuation
    prompt + completion              the completion's tokens, tokenised separately from the prompt, and the end-of-text token
    text                             every token, and the end-of-text token
    messages                         what the model would have generated in each assistant turn: from the end of the
                                     generation prompt to the end-of-turn token; white space after that token belongs to
                                     the template

The end-of-text token is left out with "append_eos": false, or if the text ends with a token that ends an answer. A prompt or
text that begins with the begin-of-text token gets no second one. A token that begins before a span is context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Encoding

from apollo_tp.coordinator.samples.conversation import Chat, Conversation
from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import Serving, read_tokenizer


class Renderer:
    """Tokenises with the tokenizer and chat templates that the server uses, as it published them in ``folder``.

    Raises ConfigError, with the reason, if there is no tokenizer.
    """

    def __init__(self, serving: Serving, folder: Path) -> None:
        self._serving, self._tokenizer = serving, read_tokenizer(serving, folder)
        probe = self._tokenizer.encode("a", add_special_tokens=True)
        first = probe.special_tokens_mask.index(0) if 0 in probe.special_tokens_mask else 0
        self._prefix = list(probe.ids[:first])
        """The tokens that the tokenizer adds before a text: mostly one begin-of-text token."""
        # The post-processor adds special tokens, which a rendered conversation has already, and trims the offsets, which
        # the spans need untrimmed.
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
        """Token ids of ``text`` after those that the tokenizer adds before it, unless the text begins with them already."""
        ids = self.encode(text, field)
        return ids if self._prefix and ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _encoding(self, text: str, field: str) -> Encoding:
        for token in self._refused:
            if token in text:
                raise refuse(field, f"a text with {token}", "one without: this server's tokenizer treats it in Python")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> list[str]:
        """The text of each token, to show it to a client."""
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
        """``ids`` and the end-of-text token, unless they end with a token that ends an answer, and white space."""
        last = max((index for index, token in enumerate(ids) if token in self._ends), default=None)
        if not append_eos or self.eos_id is None:
            return ids
        if last is not None and not self._tokenizer.decode(ids[last + 1 :], skip_special_tokens=False).strip():
            return ids
        return [*ids, self.eos_id]

    def chat(self, chat: Chat, weights: Sequence[float], max_tokens: int) -> tuple[list[int], list[float]]:
        """Token ids and weights of a conversation; ``weights`` has one number per assistant message.

        Raises RequestError if the server has no template, the template refuses the messages, they are more than
        ``max_tokens`` tokens, or an assistant turn whose weight is not 0 cannot be located exactly.
        """
        conversation = Conversation(chat, self._serving)
        try:
            conversation.text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, from an escape in a tool call's arguments
            raise refuse("messages", f"invalid characters ({error.reason})", "text") from error
        encoding = self._encoding(conversation.text, "messages")
        if (
            len(encoding.ids) > max_tokens
        ):  # checked before the turns are located, which takes a rendering or two for each
            raise too_long("messages", len(encoding.ids), max_tokens)
        values = [0.0] * len(encoding.ids)
        turns = conversation.turns([weight > 0 for weight in weights])
        for (begin, end), weight in zip(turns, (weight for weight in weights if weight > 0), strict=True):
            if not conversation.marked:
                end = self._without_trailing_space(conversation.text, begin, end)
            for index, (first, last) in enumerate(encoding.offsets):
                # the end-of-turn token of some tokenizers includes the white space after it
                inside = last <= end or (first < end and encoding.ids[index] in self._closing)
                if begin <= first and inside and first < last:
                    values[index] = weight
        return list(encoding.ids), values

    def _without_trailing_space(self, text: str, begin: int, end: int) -> int:
        body = text[begin:end].rstrip()
        return begin + len(body) if body.endswith(tuple(self._closing.values())) else end


def too_long(field: str, count: int, limit: int) -> RequestError:
    """The error for a sample of ``count`` tokens."""
    return refuse(field, f"{count} tokens", f"at most {limit} (see 'truncate')", code="sequence_too_long")
