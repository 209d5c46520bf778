"""Graders as OpenAI's clients describe them, and what is refused of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_tp.coordinator.graders.formula import Formula
from apollo_tp.coordinator.graders.templates import GraderError, check_template, item_tags, look_up
from apollo_tp.errors import refuse

MAX_SOURCE = 256 * 1024
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=MAX_SOURCE)]
SIMILARITIES = ("fuzzy_match", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l", "gleu")
"""Offered metrics of text_similarity; ``similarity`` says how they are computed."""


class StringCheck(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="string_check"):
    """1 or 0: whether ``input`` and ``reference`` are equal, differ, or one contains the other."""

    name: Name
    input: Text
    reference: Text
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text_similarity"):
    """From 0 to 1: how similar ``input`` is to ``reference``."""

    name: Name
    input: Text
    reference: Text
    evaluation_metric: str


class JudgeMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message to the model that scores. A part of its content is a text."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Text | dict[str, Any] | list[Text | dict[str, Any]]
    type: Literal["message"] = "message"


class JudgeSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the model that scores is sampled."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_completions_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    seed: int | None = None
    reasoning_effort: str | None = None


class ScoreModel(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="score_model"):
    """The number within ``range`` that another model gives."""

    name: Name
    model: Name
    input: Annotated[list[JudgeMessage], Meta(min_length=1, max_length=64)]
    range: Annotated[list[float], Meta(min_length=2, max_length=2)] = msgspec.field(default_factory=lambda: [0.0, 1.0])
    sampling_params: JudgeSampling | None = None


class Python(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="python"):
    """The number that ``grade(sample, item)`` in ``source`` returns."""

    name: Name
    source: Text
    image_tag: str | None = None


Single = StringCheck | TextSimilarity | ScoreModel | Python


class Multi(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="multi"):
    """``calculate_output``, a formula of the rewards of ``graders`` by name."""

    name: Name
    graders: dict[str, Single]
    calculate_output: Annotated[str, Meta(min_length=1, max_length=4096)]


Grader = StringCheck | TextSimilarity | ScoreModel | Python | Multi


class Offered(msgspec.Struct, frozen=True):
    """What the trainer's options allow: an address for models that score, and code of clients."""

    score_model: bool = False
    python: bool = False


def read_grader(value: Any, offered: Offered, field: str = "grader") -> Grader:
    """The grader that a client sent. Raises RequestError with the field that is wrong, and for what is not offered."""
    if isinstance(value, dict) and value.get("type") == "multi" and isinstance(value.get("graders"), dict):
        graders = value["graders"]
        if isinstance(graders.get("type"), str):  # the SDK's type has a single grader here
            value = value | {"graders": {str(graders.get("name")): graders}}
    if isinstance(value, dict) and value.get("type") in ("label_model", "endpoint"):
        kinds = "string_check, text_similarity, score_model, multi or python"
        raise refuse(f"{field}.type", repr(value["type"]), kinds)
    try:
        grader: Grader = msgspec.convert(value, Grader)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise refuse(f"{field}{path.rstrip('`')}", what, "a grader as in OpenAI's API") from error
    _check(grader, offered, field)
    return grader


def _check(grader: Grader, offered: Offered, field: str) -> None:
    if isinstance(grader, Multi):
        if not grader.graders:
            raise refuse(f"{field}.graders", "no graders", "at least one")
        Formula(grader.calculate_output, f"{field}.calculate_output").check(grader.graders)
        for name, each in grader.graders.items():
            _check(each, offered, f"{field}.graders.{name}")
    elif isinstance(grader, StringCheck | TextSimilarity):
        for name in ("input", "reference"):
            check_template(getattr(grader, name), f"{field}.{name}")
        if isinstance(grader, TextSimilarity) and grader.evaluation_metric not in SIMILARITIES:
            raise refuse(
                f"{field}.evaluation_metric", repr(grader.evaluation_metric[:40]), f"one of {', '.join(SIMILARITIES)}"
            )
    elif isinstance(grader, ScoreModel):
        _check_judge(grader, offered, field)
    elif not offered.python:
        raise refuse(
            f"{field}.type", "'python'", "another type: code of clients is run only with rl.python_graders=true"
        )


def _check_judge(grader: ScoreModel, offered: Offered, field: str) -> None:
    if not offered.score_model:
        raise refuse(f"{field}.type", "'score_model'", "another type, or rl.score_model_url set to the address of an "
                     "OpenAI-compatible API that serves the model")  # fmt: skip
    if not grader.range[0] < grader.range[1]:
        raise refuse(f"{field}.range", repr(grader.range), "two numbers, the lower one first")
    for index, message in enumerate(grader.input):
        check_template(text_of(message, f"{field}.input[{index}].content"), f"{field}.input[{index}].content")


def text_of(message: JudgeMessage, field: str) -> str:
    """The message's text. Raises RequestError for images and audio."""
    parts = message.content if isinstance(message.content, list) else [message.content]
    found = []
    for part in parts:
        if isinstance(part, dict):
            if part.get("type") not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
                raise refuse(field, f"a part of type {str(part.get('type'))[:40]!r}", "text")
            part = part["text"]
        found.append(part)
    return "".join(found)


def check_item(grader: Grader, item: dict[str, Any]) -> None:
    """Raise RequestError if templates of the grader name a field that a line of the file has not."""
    for each in singles(grader).values():
        texts = [text_of(message, "input") for message in each.input] if isinstance(each, ScoreModel) else []
        if isinstance(each, StringCheck | TextSimilarity):
            texts = [each.input, each.reference]
        for tag in (tag for text in texts for tag in item_tags(text)):
            try:
                look_up(tag, {"item": item})
            except GraderError as error:
                raise refuse(tag, "nothing", f"this field, which grader {each.name!r} names") from error


def singles(grader: Grader) -> dict[str, Single]:
    """The graders of which this one consists, by name."""
    return dict(grader.graders) if isinstance(grader, Multi) else {grader.name: grader}
