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

from apollo_tp.coordinator.samples.conversation import Chat, Conversation, unsupported
from apollo_tp.coordinator.samples.statements import Said
from apollo_tp.coordinator.samples.template import Span
from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import Serving, read_tokenizer

MANY_BYTES_PER_TOKEN = 8
"""Texts with more bytes than this for each allowed token are measured before they are tokenised."""
MAX_SHRINKING = 4
"""By how much a normalizer may make a text shorter, in bytes (a mathematical letter becomes an ASCII one)."""
PIECE = 2**16
"""Characters that are tokenised at once to measure a text."""


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
        self._stops = [self._closing[id] for id in self._ends if id in self._closing]
        longest = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        self._max_token_bytes = longest * (1 if self._tokenizer.normalizer is None else MAX_SHRINKING)

    def encode(self, text: str, field: str = "text", max_tokens: int | None = None) -> list[int]:
        """Token ids of ``text`` alone, as the server makes them. Raises RequestError if they are not known, or are many more
        than ``max_tokens``."""
        return list(self._encoding(text, field, max_tokens).ids)

    def begun(self, text: str, field: str = "text", max_tokens: int | None = None) -> list[int]:
        """Token ids of ``text`` after those that the tokenizer adds before it, unless the text begins with them already."""
        ids = self.encode(text, field, max_tokens)
        return ids if self._prefix and ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _encoding(self, text: str, field: str, max_tokens: int | None) -> Encoding:
        for token in self._refused:
            if token in text:
                raise refuse(field, f"a text with {token}", "one without: this server's tokenizer treats it in Python")
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:  # half of a surrogate pair, from an escape in a tool call's arguments
            raise refuse(field, f"invalid characters ({error.reason})", "text") from error
        if max_tokens is not None and num_bytes > MANY_BYTES_PER_TOKEN * max_tokens:
            self._refuse_long(text, num_bytes, field, max_tokens)
        return self._encode(text)

    def _encode(self, text: str) -> Encoding:
        # encode() would hold the GIL: no request would be answered meanwhile
        return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]

    def _refuse_long(self, text: str, num_bytes: int, field: str, max_tokens: int) -> None:
        """Refuse a text that is much too long without tokenising all of it, which takes 250 times its size in memory."""
        if num_bytes > max_tokens * self._max_token_bytes:
            raise too_long(field, f"{num_bytes} bytes", max_tokens)
        count = 0
        for begin in range(0, len(text), PIECE):
            count += len(self._encode(text[begin : begin + PIECE]))
            if count > 2 * max_tokens:  # a few tokens more than those of the whole text, because of the cuts
                raise too_long(field, f"about {count * len(text) // (begin + PIECE)} tokens", max_tokens)

    def decode(self, ids: list[int]) -> list[str]:
        """The text of each token, to show it to a client."""
        return [self._tokenizer.decode([token], skip_special_tokens=False) for token in ids]

    def prompt_completion(
        self, prompt: str, completion: str, *, append_eos: bool, max_tokens: int | None = None
    ) -> tuple[list[int], list[float]]:
        """Token ids and weights of a prompt and its completion; see the module docstring."""
        context = self.begun(prompt, "prompt", max_tokens)
        target = self._ended(self.encode(completion, "completion", max_tokens), append_eos)
        if not prompt and self._prefix and target[: len(self._prefix)] == self._prefix:
            context = []
        return context + target, [0.0] * len(context) + [1.0] * len(target)

    def text(self, text: str, *, append_eos: bool, max_tokens: int | None = None) -> tuple[list[int], list[float]]:
        """Token ids and weights of a plain text."""
        ids = self._ended(self.begun(text, "text", max_tokens), append_eos)
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
        encoding = self._encoding(conversation.text, "messages", max_tokens)
        # checked before the turns are located, which takes a rendering or two for each
        if len(encoding) > max_tokens:
            raise too_long("messages", f"{len(encoding)} tokens", max_tokens)
        turns = conversation.turns([weight > 0 for weight in weights])
        if turns.text != conversation.text:
            encoding = self._encoding(turns.text, "messages", max_tokens)
        spans = turns.spans
        if not conversation.marked:
            spans = [self._until_stop(turns.text, *span) for span in zip(spans, turns.said, strict=True)]
        if turns.appended.strip():
            closed = len(turns.text) - len(turns.appended) + self._end_in(turns.appended)
            spans[-1] = spans[-1][0], min(closed, spans[-1][1])
        return self._weighted(encoding, spans, [weight for weight in weights if weight > 0])

    def generation_prompt(self, chat: Chat, max_tokens: int) -> list[int]:
        """Token ids of a conversation with the generation prompt at its end, after which a model would answer. Raises
        RequestError."""
        text = Conversation(chat, self._serving).with_prompt()
        return self.encode(text, "messages", max_tokens)

    def _weighted(
        self, encoding: Encoding, spans: Sequence[Span], weights: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """The token ids, and for each the weight of the span that it is in, or 0. The spans are in order."""
        ids = list(encoding.ids)
        values, turn = [0.0] * len(ids), 0
        for index, (first, last) in enumerate(encoding.offsets):
            while turn < len(spans) and first >= spans[turn][1]:
                turn += 1
            if turn == len(spans):
                break
            begin, end = spans[turn]
            # the end-of-turn token of some tokenizers includes the white space after it
            if begin <= first < last and (last <= end or ids[index] in self._closing):
                values[index] = weights[turn]
        return ids, values

    def _end_in(self, appended: str) -> int:
        """Where the turn ends in what the template adds after it: after the first token that may close it."""
        ends = [appended.index(token) + len(token) for token in self._closing.values() if token in appended]
        if not ends:
            raise unsupported(
                f"it ends with {appended!r} after the last message, and without a token that closes the turn"
            )
        return min(ends)

    def _until_stop(self, text: str, span: Span, said: Said) -> Span:
        """The span up to the token at which the server stops: what a template adds after it, white space or even the next
        turn's header, is never generated."""
        begin, end = span
        if (at := text.find(said.last, begin, end)) >= 0:
            tokens = [token for token in self._stops if token not in said.all]
            found = [stop + len(token) for token in tokens if (stop := text.find(token, at + len(said.last), end)) >= 0]
            end = min(found, default=end)
        body = text[begin:end].rstrip()
        return begin, begin + len(body) if body.endswith(tuple(self._closing.values())) else end


def too_long(field: str, got: str, limit: int) -> RequestError:
    """The error for a sample that is ``got`` long."""
    return refuse(field, got, f"at most {limit} tokens (see 'truncate')", code="sequence_too_long")
