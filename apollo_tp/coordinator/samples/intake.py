"""Validates and tokenises the samples of a request: forms, limits, truncation. Nothing of a refused request is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from apollo_tp.coordinator.samples.conversation import UNSUPPORTED_TEMPLATE, Chat
from apollo_tp.coordinator.samples.messages import meant_role, unknown_role
from apollo_tp.coordinator.samples.render import Renderer, too_long
from apollo_tp.coordinator.samples.sample_file import Pair, Prompt
from apollo_tp.coordinator.samples.sampled import Groups, check_fields, is_sampled, sampled_of
from apollo_tp.coordinator.samples.schema import Message, PreferenceLine, PromptLine, SampleBody, TrainBody, Truncate
from apollo_tp.errors import ApolloTpError, RequestError, refuse
from apollo_tp.wire.commands import Sample
from apollo_tp.wire.losses import Loss, complete

MAX_CUT_FACTOR = 16
"""Texts and conversations longer than this many sequences are refused, not truncated."""
MAX_SPLIT_TOKENS = 2**20
"""Tokens of all sequences that one conversation may become."""
FORMS = {
    "context_ids + continuation_ids": ("context_ids", "continuation_ids"), "messages": ("messages",),
    "prompt + completion": ("prompt", "completion"), "text": ("text",),
}  # fmt: skip
"""The forms of a sample that no model has sampled, and the fields of each."""


@dataclass(frozen=True)
class Limits:
    """What the ranks accept. ``vocab_size`` is None while neither rank 0 nor the model folder says it."""

    vocab_size: int | None
    max_sequence_tokens: int


_NOTHING = SampleBody()


class AbandonedError(ApolloTpError):
    """Nobody wants these samples any more."""


class Intake:
    """Makes the samples of one request. If ``renderer`` is a string, it says why only token ids are accepted.

    Once ``is_abandoned()`` is true, the next sample raises AbandonedError.
    """

    def __init__(
        self,
        renderer: Renderer | str,
        limits: Limits,
        truncate: Truncate,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        self._renderer, self._limits, self._truncate = renderer, limits, truncate
        self._is_abandoned = is_abandoned
        self._loss = Loss()
        self._groups: Groups | None = None

    def check_wanted(self) -> None:
        """Raise AbandonedError if nobody wants the samples any more."""
        if self._is_abandoned():
            raise AbandonedError("the samples are not wanted any more")

    def train_samples(self, body: TrainBody, samples: Iterable[SampleBody] | None) -> Iterator[Sample]:
        """Validate and tokenise all samples of a POST /train body: its ``samples``, one after the other, or its own fields.
        Raises RequestError."""
        self._loss = complete(body.loss, body.loss_config)
        if self._loss.name != "cross_entropy":
            by_std = self._loss.config.group_std is not False
            self._groups = Groups([body] if samples is None else samples, by_std=by_std)
        if samples is None:
            yield from self.sequences(body, "")
            return
        own = [name for name in SampleBody.__struct_fields__ if getattr(body, name) != getattr(_NOTHING, name)]
        if own:
            raise refuse(own[0], "it together with 'samples'", "either 'samples' or the fields of one sample")
        for index, sample in enumerate(samples):
            yield from self.sequences(sample, f"samples[{index}].")

    def samples(self, bodies: Iterable[SampleBody], field: str = "samples") -> list[Sample]:
        """Validate and tokenise each element of a request's list ``field``, one sequence each. Raises RequestError."""
        return [self.sample(sample, f"{field}[{index}].") for index, sample in enumerate(bodies)]

    def sequences(self, body: SampleBody, where: str) -> list[Sample]:
        """The sample as one sequence or, if its assistant turns cannot be located or are not shown completely, as one
        sequence per assistant turn.

        Each of these ends with its turn. They are needed where the whole conversation does not show its turns as they were
        generated, for example with a template that drops the reasoning of earlier turns. Raises RequestError.
        """
        check_fields(body, self._loss, where)
        messages = body.messages or []
        try:
            return [self.sample(body, where)]
        except RequestError as error:
            turns = [i for i, m in enumerate(messages) if m.role == "assistant" and m.weight != 0]
            if error.code != UNSUPPORTED_TEMPLATE or turns in ([], [len(messages) - 1]):
                raise
        found: list[Sample] = []
        for index in turns:
            found.append(self.sample(msgspec.structs.replace(body, messages=_up_to(messages, index)), where))
            if sum(len(sample.token_ids) for sample in found) > MAX_SPLIT_TOKENS:
                raise refuse(
                    f"{where}messages", f"{len(turns)} turns, each of which needs a sequence of its own with all before it",
                    f"at most {MAX_SPLIT_TOKENS} tokens in all of these: send the conversation in parts",
                )  # fmt: skip
        return found

    def sample(self, body: SampleBody, where: str) -> Sample:
        """Validate and tokenise one sample; ``where`` prefixes the field in errors. Raises RequestError."""
        self.check_wanted()
        if is_sampled(body):
            try:
                return self._completion(body)
            except RequestError as error:
                error.field = f"{where}{error.field}" if error.field else where.rstrip(".") or "body"
                raise
        forms = [form for form, names in FORMS.items() if any(getattr(body, name) for name in names)]
        if not forms:  # an empty field is none, unless there is no other
            forms = [form for form, names in FORMS.items() if any(getattr(body, name) is not None for name in names)]
        if len(forms) != 1:
            field = where.rstrip(".") or "body"
            raise refuse(field, " and ".join(forms) or "no data", "exactly one of " + ", ".join(FORMS))
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name) and not body.messages:
                raise refuse(f"{where}{name}", f"{name} without messages", f"{name} only with messages")
        try:
            ids, weights = self._tokens(body, forms[0])
        except RequestError as error:
            error.field = f"{where}{error.field}" if error.field else where.rstrip(".")
            raise
        return self.checked(ids, [weight * body.weight for weight in weights], where + forms[0].rpartition(" ")[2])

    def _completion(self, body: SampleBody) -> Sample:
        """A sampled completion. It is never truncated: its tokens were drawn after the whole prompt."""
        others = [
            name for name, fields in FORMS.items() if name != "messages" and any(getattr(body, f) for f in fields)
        ]
        prompts = [name for name in ("prompt_ids", "messages") if getattr(body, name) is not None]
        if others or len(prompts) != 1 or not body.completion_ids:
            got = " and ".join([*prompts, *others]) or "no prompt"
            expected = "completion_ids after either prompt_ids or messages"
            raise refuse("sample", got, expected)
        if body.messages:
            renderer = self._text_renderer("messages")
            chat = Chat(body.messages, body.tools, body.chat_template_kwargs)
            prompt = renderer.generation_prompt(chat, self._limits.max_sequence_tokens)
        else:
            prompt = body.prompt_ids or []
        for name, ids in (("prompt_ids", prompt), ("completion_ids", body.completion_ids)):
            self._check_vocabulary(name, ids)
        length, limit = len(prompt) + len(body.completion_ids), self._limits.max_sequence_tokens
        if length > limit:
            raise too_long("completion_ids", f"{length} tokens with the prompt", limit)
        sampled = sampled_of(body, self._groups)
        weights = body.weights or [1.0] * len(body.completion_ids)
        weights = [0.0] * len(prompt) + [weight * body.weight for weight in weights]
        sample = self.checked([*prompt, *body.completion_ids], weights, "completion_ids")
        return msgspec.structs.replace(sample, sampled=sampled)

    @property
    def _max_text_tokens(self) -> int:
        """Longer texts are refused, also those that would be truncated."""
        return self._limits.max_sequence_tokens * (1 if self._truncate is Truncate.refuse else MAX_CUT_FACTOR)

    def _tokens(self, body: SampleBody, form: str) -> tuple[list[int], list[float]]:
        if form == "messages":
            return self._chat(Chat(body.messages or [], body.tools, body.chat_template_kwargs))
        if form == "text":
            renderer = self._text_renderer("text")
            return renderer.text(body.text or "", append_eos=body.append_eos, max_tokens=self._max_text_tokens)
        if form == "prompt + completion":
            if not body.completion:
                raise refuse("completion", "an empty completion" if body.completion == "" else "nothing", "some text")
            renderer = self._text_renderer("prompt")
            return renderer.prompt_completion(
                body.prompt or "", body.completion, append_eos=body.append_eos, max_tokens=self._max_text_tokens
            )
        if not body.continuation_ids:
            raise refuse("continuation_ids", "no token", "at least one token id")
        context, target = body.context_ids or [], body.continuation_ids
        for name, ids in (("context_ids", context), ("continuation_ids", target)):
            self._check_vocabulary(name, ids)
        return [*context, *target], [0.0] * len(context) + [1.0] * len(target)

    def _check_vocabulary(self, name: str, ids: list[int]) -> None:
        size = self._limits.vocab_size
        if size is None:
            raise RequestError(
                "token ids cannot be checked before the trainer has connected; try again later",
                status=503,
                code="no_trainer",
            )
        for index, token in enumerate(ids):
            if not 0 <= token < size:
                raise refuse(f"{name}[{index}]", str(token), f"a token id from 0 to {size - 1}")

    def _text_renderer(self, field: str) -> Renderer:
        if isinstance(self._renderer, str):
            raise refuse(field, f"text, but {self._renderer}", "token ids (context_ids, continuation_ids)")
        return self._renderer

    def _chat(self, chat: Chat, *, only_last: bool = False) -> tuple[list[int], list[float]]:
        renderer = self._text_renderer("messages")
        weights = []
        for index, message in enumerate(chat.messages):
            if message.role == "assistant":
                weights.append(1.0 if message.weight is None else message.weight)
            elif message.weight:
                raise refuse(
                    f"messages[{index}].weight", f"a weight on role {message.role!r}", "a weight only on assistant"
                )
        if only_last:
            weights = [0.0] * (len(weights) - 1) + weights[-1:]
        if not any(weights):
            for index, message in enumerate(chat.messages):
                if message.role != "assistant" and meant_role(message.role) == "assistant":
                    raise unknown_role(message.role, f"messages[{index}].role")
            raise refuse("messages", "no assistant message with a weight above 0", "at least one to learn from")
        try:
            return renderer.chat(chat, weights, self._max_text_tokens)
        except RecursionError:
            raise refuse("messages", "values nested too deep to be rendered", "a few levels") from None

    def checked(self, ids: list[int], weights: list[float], field: str) -> Sample:
        """The sample with truncation and limits applied. Raises RequestError naming ``field``."""
        limit = self._limits.max_sequence_tokens
        if len(ids) > limit:
            if self._truncate is Truncate.refuse:
                raise too_long(field, f"{len(ids)} tokens", limit)
            part = slice(-limit, None) if self._truncate is Truncate.left else slice(0, limit)
            ids, weights = ids[part], weights[part]
        # the first token of a sequence has no predictor
        weights = [0.0, *weights[1:]]
        if not any(weights):
            raise refuse(field, f"{len(ids)} tokens of which none can be learned",
                         "at least one token of the continuation after another token")  # fmt: skip
        self._check_vocabulary(field, ids)
        return Sample(token_ids=ids, weights=weights)

    def prompt(self, line: PromptLine, item: dict[str, Any]) -> Prompt:
        """The prompt of a line of a reinforcement job, with its fields for the grader."""
        last = line.messages[-1]
        if last.role == "assistant":
            raise refuse(f"messages[{len(line.messages) - 1}].role", "'assistant'", "'user': the model is to answer")
        chat, limit = Chat(line.messages, line.tools, line.chat_template_kwargs), self._limits.max_sequence_tokens
        ids = self._text_renderer("messages").generation_prompt(chat, limit)
        if len(ids) >= limit:
            raise too_long("messages", f"{len(ids)} tokens and a completion", limit)
        self._check_vocabulary("messages", ids)
        parts = last.content if isinstance(last.content, list) else [{"text": last.content or ""}]
        return Prompt(ids, "".join(str(part.get("text", "")) for part in parts), item)

    def pair(self, line: PreferenceLine) -> Pair:
        """The pair of a DPO line: both sides share the input, and only the last assistant message of each is learned."""
        sides = []
        for name, output in (
            ("preferred_output", line.preferred_output),
            ("non_preferred_output", line.non_preferred_output),
        ):
            if output[-1].role != "assistant":
                raise refuse(f"{name}[{len(output) - 1}].role", repr(output[-1].role), "'assistant'")
            chat = Chat([*line.input.messages, *output], line.input.tools, line.input.chat_template_kwargs)
            ids, weights = self._chat(chat, only_last=True)
            sides.append(self.checked(ids, weights, name))
        if sides[0].token_ids == sides[1].token_ids:  # with other weights, too, nothing is preferred
            raise refuse("non_preferred_output", "the same tokens as for preferred_output", "another answer")
        return Pair(*sides)


def _up_to(messages: list[Message], index: int) -> list[Message]:
    """The conversation up to its assistant message ``index``, the only one that is learned."""
    before = [msgspec.structs.replace(m, weight=0.0) if m.role == "assistant" else m for m in messages[:index]]
    return [*before, messages[index]]
