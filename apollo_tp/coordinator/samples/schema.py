"""Request bodies as msgspec structs, and how a schema error becomes the field, got and expected of a 4xx body."""

from __future__ import annotations

import codecs
import mmap
import re
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from apollo_tp.coordinator.samples.lines import kind_of, malformed
from apollo_tp.coordinator.samples.unique_keys import check_unique_keys
from apollo_tp.errors import DECODE_ERRORS, RequestError
from apollo_tp.wire.losses import LossConfig, LossName

T = TypeVar("T")
Body = bytes | mmap.mmap
"""A request's body: in memory, or in a file if it is large."""

MAX_SAMPLES = 1_000_000
"""Samples in a POST /train body."""
MAX_SCORED = 1024
"""Samples in a POST /train/score body."""

TokenIds = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1_000_000)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
Logprobs = Annotated[list[Annotated[float, Meta(ge=-1e4, le=1e-3)]], Meta(max_length=1_000_000)]
Score = Annotated[float, Meta(ge=-1e6, le=1e6)]
Role = Annotated[str, Meta(min_length=1, max_length=32)]


class Truncate(Enum):
    """What to do with a sample that is too long: refuse it, or cut tokens off its left or right end."""

    refuse = "refuse"
    left = "left"
    right = "right"


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A chat message. ``weight`` scales the loss of an assistant turn (0: context only)."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    weight: Annotated[float, Meta(ge=0, le=100)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: dict[str, Any] | None = None


class SampledBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A completion that a model sampled: ``completion_ids`` after ``prompt_ids``, or after ``messages`` with the generation
    prompt. Lists have one value per token of it; log-probabilities are in nats, at ``temperature``.

    ``advantage`` is a number or one per token; in its place, a ``reward`` is compared with the others of its ``group`` in
    the request.
    """

    prompt_ids: TokenIds | None = None
    completion_ids: Annotated[TokenIds, Meta(min_length=1)] | None = None
    sampling_logprobs: Logprobs | None = None
    advantage: Annotated[list[Score], Meta(max_length=1_000_000)] | Score | None = None
    reward: Score | None = None
    group: Annotated[str, Meta(max_length=256)] | int | None = None
    temperature: Annotated[float, Meta(gt=0, le=100)] = 1.0
    weights: Annotated[list[Annotated[float, Meta(ge=0, le=100)]], Meta(max_length=1_000_000)] | None = None
    reference_logprobs: Logprobs | None = None
    teacher_logprobs: Logprobs | None = None
    weight_version: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


class SampleBody(SampledBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One training sequence, in exactly one of five forms; ``weight`` scales the loss of all its tokens."""

    context_ids: TokenIds | None = None
    continuation_ids: TokenIds | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    append_eos: bool = True
    weight: Annotated[float, Meta(gt=0, le=100)] = 1.0
    parallel_tool_calls: bool | None = None
    """Part of OpenAI's lines; no template is given it."""


class Guard(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Watches a number while a job trains: the validation loss in nats, or what the operator's command prints. Every so many
    steps it may be worse than before the job by at most ``max_worse``."""

    every: Annotated[int, Meta(ge=1, le=2**31)] = 10
    max_worse: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    action: Literal["report", "pause", "rollback"] = "report"
    measure: Literal["validation", "command"] = "validation"
    higher_is_better: bool = False
    """Of the command's number."""


class TrainBody(SampleBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /train: ``samples``, or the fields of one sample, and how to train on them."""

    samples: Annotated[list[SampleBody], Meta(min_length=1, max_length=MAX_SAMPLES)] | None = None
    epochs: Annotated[int, Meta(ge=1, le=10_000)] = 1
    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 8
    learning_rate_scale: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    max_steps: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    truncate: Truncate = Truncate.refuse
    loss: LossName = "cross_entropy"
    loss_config: LossConfig = LossConfig()
    metadata: Metadata = {}
    validation: Annotated[list[SampleBody], Meta(min_length=1, max_length=MAX_SCORED)] | None = None
    guard: Guard | None = None
    wait: bool = False
    wait_seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0


class CheckpointBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /checkpoint; may be left out."""

    wait: bool = False
    wait_seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0


class ScoreOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /train/score without its samples, which are decoded apart. ``per_token``: with the log-probability of
    each token."""

    samples: Any = None
    truncate: Truncate = Truncate.refuse
    per_token: bool = False


class ScoreBody(ScoreOptions, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /train/score."""

    samples: Annotated[list[SampleBody], Meta(min_length=1, max_length=MAX_SCORED)]


class Preference(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The ``input`` of a line of a DPO file."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class PreferenceLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of a DPO JSONL file."""

    input: Preference
    preferred_output: Annotated[list[Message], Meta(min_length=1)]
    non_preferred_output: Annotated[list[Message], Meta(min_length=1)]


class PairsBody(msgspec.Struct, kw_only=True):
    """A job of method "dpo" that this process makes by itself."""

    pairs: list[PreferenceLine]
    beta: float
    learning_rate_scale: float
    metadata: Metadata
    guard: Guard | None = None


class PromptLine(msgspec.Struct, kw_only=True):
    """A line of a file for method "reinforcement": a conversation that the model is to continue. Further fields are for the
    grader."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def is_absent(value: object) -> bool:
    """Whether a field of this value says nothing: null, empty, or of nothing else."""
    if isinstance(value, dict | list):
        return all(map(is_absent, value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?$", re.DOTALL)
_GOT = re.compile(r"^Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`$")
_EXPECTED = re.compile(r"^Expected (?P<expected>.*)$", re.DOTALL)


def decode(data: bytes, kind: type[T], where: str = "") -> T:
    """The JSON as ``kind``. ``where`` prefixes the field in errors. Raises RequestError naming field, got and expected."""
    data = data.removeprefix(codecs.BOM_UTF8)
    check_unique_keys(data, where)
    try:
        return msgspec.json.decode(data, type=kind)
    except DECODE_ERRORS as error:
        raise schema_error(error, data, kind, where) from error


def schema_error(error: Exception, data: bytes, kind: type, where: str = "") -> RequestError:
    """msgspec's error about ``data`` as a ``kind``: a RequestError with field, got and expected from its message."""
    if not isinstance(error, msgspec.ValidationError):
        field = where.rstrip(".") or "body"
        known, objects = kind_of(data) or malformed(data), f"a JSON object{_several(kind)}"
        text = f"{field}: got {known or f'malformed JSON ({error})'}, expected {objects}"
        return RequestError(
            text, field=field, got=known or repr(data[:40])[1:], expected=objects, code="malformed_json"
        )
    match = _PATH.match(str(error))
    assert match is not None
    what, path = match["what"], (match["path"] or "$").removeprefix("$").removeprefix(".")
    field, text = path or "body", what
    got, expected = what, "a value of the documented type"
    if exact := _GOT.match(what):
        got, expected = exact["got"], exact["expected"]
        if not path and not where:
            expected += _several(kind)
            text = f"got {got}, expected {expected}"
    elif what.startswith(("Object contains unknown field", "Object missing required field")):
        name = what.split("`")[1]
        field = f"{path}.{name}" if path else name
        got, expected = "nothing", "this field"
        if "unknown" in what:
            got, expected = f"unknown field {name!r}", f"one of {', '.join(_fields(kind, path))}"
            text = f"got an unknown field, expected {expected}"
    elif some := _EXPECTED.match(what):
        got, expected = "another value", some["expected"]
    field = f"{where}{field}" if field != "body" else where.rstrip(".") or "body"
    return RequestError(f"{field}: {text}", field=field, got=got, expected=expected, code="invalid_value")


def _several(kind: type) -> str:
    """Where a body of this kind has several samples."""
    return ", several samples in its field 'samples'" if "samples" in getattr(kind, "__struct_fields__", ()) else ""


def _fields(kind: type, path: str) -> list[str]:
    """Names of the fields of the object at ``path`` in a value of this kind."""
    node: Any = msgspec.inspect.type_info(kind)
    for name in [*re.findall(r"[^.\[\]]+|\[", path), ""]:
        for each in getattr(node, "types", ()):  # of a union, the one that is no null
            node = each if hasattr(each, "fields") or hasattr(each, "item_type") else node
        if name == "[":
            node = node.item_type
        elif name.strip(".0123456789"):
            node = next(field.type for field in node.fields if field.encode_name == name)
    return [field.encode_name for field in node.fields]
