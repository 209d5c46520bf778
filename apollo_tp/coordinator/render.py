"""Text -> token ids with loss weights: the served tokenizer, its chat template, and what counts as an assistant turn.

Which tokens are learned from (weight > 0):

    context_ids + continuation_ids   the continuation
    prompt + completion              the completion's tokens, tokenised apart from the prompt's, and the end-of-text token
    text                             every token, and the end-of-text token (none with "append_eos": false)
    messages                         what the model would have had to generate in each assistant turn: from behind the
                                     generation prompt to the end-of-turn token; white space behind that token is the
                                     template's, not the model's

The spans of the assistant turns come from the template's own {% generation %} marks if it has them. Otherwise the
conversation is rendered again with a mark behind one message, and the rendering without the mark must equal the whole
conversation's, character by character: so a template that changes earlier turns (strips reasoning, trims) is handled or
refused, never guessed. A token that begins before a span is context.

The template runs in jinja2's immutable sandbox with the settings of transformers, which would cost seconds to import.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from apollo_tp.errors import ConfigError, RequestError

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


class Renderer:
    """The tokenizer and chat template that the server uses: the model folder's, unless it was started with others
    (``folder``, the tokenizer's; ``chat_template``, a text). Raises ConfigError if there is no tokenizer.json."""

    def __init__(self, model_path: Path, folder: Path | None = None, chat_template: str | None = None) -> None:
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
        self._special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        self._added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self.eos_id = self._eos(model_path)
        self._template = self._compile(chat_template or _find_template(folder, config))

    def _eos(self, model_path: Path) -> int | None:
        if "eos_token" in self._special:
            return self._tokenizer.token_to_id(self._special["eos_token"])
        eos = _read_json(model_path / "config.json").get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        return eos if isinstance(eos, int) else None

    def _compile(self, source: str | None) -> jinja2.Template | None:
        if source is None:
            return None
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        return _environment().from_string(source)

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

    def chat(
        self, messages: list[dict[str, Any]], weights: list[float], tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[float]]:
        """Token ids and weights of a conversation; ``weights`` has one number per message (0 outside assistant turns).

        Raises RequestError if the template refuses the messages or their assistant turns cannot be told exactly.
        """
        text, spans = self._assistant_spans(messages, tools)
        encoding = self._bare.encode(text, add_special_tokens=False)
        values = [0.0] * len(encoding.ids)
        for (begin, end), weight in zip(spans, [w for w in weights if w >= 0], strict=True):
            for index, (first, last) in enumerate(encoding.offsets):
                if begin <= first and last <= end and first < last:
                    values[index] = weight
        return list(encoding.ids), values

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool = False) -> str:
        if self._template is None:
            raise RequestError(
                "messages: the served model has no chat template; send prompt + completion, text or token ids",
                field="messages", got="messages", expected="prompt and completion, text, or token ids",
            )  # fmt: skip
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RequestError(
                f"messages: the chat template refused them: {error}", field="messages", got=str(error),
                expected="messages that the served model's chat template takes",
            ) from error  # fmt: skip

    def _assistant_spans(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        if MARK in json.dumps(messages, ensure_ascii=False):
            raise RequestError("messages: got apollo_tp's own mark inside a message", field="messages")
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        text = self._render(messages, tools)
        if self._template is not None and self._has_marks:
            parts = text.split(MARK)
            if len(parts) != 2 * len(turns) + 1:
                raise _untellable(f"the template marks {len(parts) // 2} generations in {len(turns)} assistant turns")
            starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
            return "".join(parts), [(starts[i], starts[i] + len(parts[i])) for i in range(1, len(parts), 2)]
        return text, [self._span(text, messages, tools, index) for index in turns]

    def _span(self, text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, index: int) -> Span:
        head = self._render(messages[:index], tools, prompt=True)
        if not text.startswith(head):
            raise _untellable(f"message {index}: its generation prompt is not how the whole conversation begins")
        alone = self._render(messages[: index + 1], tools)
        end = len(alone)
        if not text.startswith(alone):
            end = self._marked_end(text, messages, tools, index)
        return len(head), self._without_trailing_space(text, len(head), end)

    def _marked_end(
        self, text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, index: int
    ) -> int:
        """End of an assistant turn that later messages change: mark where its content ends, in both renderings."""
        content = messages[index].get("content")
        if not isinstance(content, str):
            raise _untellable(f"message {index}: later messages change how it is rendered, and it has no text content")
        marked = [dict(message) for message in messages]
        marked[index]["content"] = content.rstrip() + MARK
        whole = self._render(marked, tools).split(MARK)
        alone = self._render(marked[: index + 1], tools).split(MARK)
        if len(whole) != 2 or len(alone) != 2 or "".join(whole) != text or not whole[1].startswith(alone[1]):
            raise _untellable(f"message {index}: later messages change how it is rendered")
        return len(whole[0]) + len(alone[1])

    def _without_trailing_space(self, text: str, begin: int, end: int) -> int:
        body = text[begin:end].rstrip()
        return begin + len(body) if body.endswith(tuple(self._added)) and self._added else end


def _find_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # named templates
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source if isinstance(source, str) else None


def _untellable(reason: str) -> RequestError:
    return RequestError(
        f"messages: the assistant turns cannot be told exactly from this chat template: {reason}. "
        "Use a template with {% generation %} marks, or send prompt + completion",
        field="messages",
        got=reason,
        expected="a conversation whose assistant turns the template renders in place",
        code="unsupported_template",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
