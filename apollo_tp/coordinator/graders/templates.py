"""Texts of a grader with ``{{ item.FIELD }}`` and ``{{ sample.output_text }}`` in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from apollo_tp.errors import DECODE_ERRORS, ApolloTpError, refuse

NAMESPACES = ("item", "sample")
SAMPLE_FIELDS = ("output_text", "output_json")
_TAG = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"\w+(?:\.\w+|\[\d+\])*")
_STEP = re.compile(r"\w+")


class GraderError(ApolloTpError):
    """A sample could not be graded. ``kind`` is the name of OpenAI's flag for it."""

    def __init__(self, message: str, kind: str = "other_error") -> None:
        super().__init__(message)
        self.kind = kind


def namespaces(item: dict[str, Any], output: str) -> dict[str, Any]:
    """What templates may name: the line of the training file, and the completion. ``output_json`` is there if the completion
    is JSON."""
    sample: dict[str, Any] = {"output_text": output}
    try:
        sample["output_json"] = msgspec.json.decode(output)
    except (*DECODE_ERRORS, UnicodeEncodeError):
        pass
    return {"item": item, "sample": sample}


def check_template(text: str, field: str) -> None:
    """Raise RequestError for a tag that no sample could fill."""
    for tag in _tags(text):
        steps = _STEP.findall(tag)
        if not _PATH.fullmatch(tag) or steps[0] not in NAMESPACES or len(steps) < 2:
            raise refuse(field, f"{{{{{tag[:60]}}}}}", "{{item.FIELD}} or {{sample.output_text}}")
        if steps[0] == "sample" and steps[1] not in SAMPLE_FIELDS:
            raise refuse(field, f"{{{{{tag[:60]}}}}}", f"sample.{' or sample.'.join(SAMPLE_FIELDS)}")


def item_tags(text: str) -> list[str]:
    """The paths below ``item`` that a template names."""
    return [tag for tag in _tags(text) if tag.startswith("item")]


def _tags(text: str) -> Iterator[str]:
    return (match[1].strip() for match in _TAG.finditer(text))


def fill(text: str, values: dict[str, Any]) -> str:
    """The text with its tags filled in; what is no text is filled in as JSON. Raises GraderError for a missing field."""
    return _TAG.sub(lambda match: _shown(look_up(match[1].strip(), values)), text)


def look_up(tag: str, values: dict[str, Any]) -> Any:
    """The value at a path such as ``item.answers[0].text``. Raises GraderError if there is none."""
    found: Any = values
    for step in _STEP.findall(tag):
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        elif tag.startswith("sample.output_json"):
            raise GraderError(f"{tag}: the completion is not JSON, or has no such field", "sample_parse_error")
        else:
            raise GraderError(f"{tag}: got no {step!r}, expected the field in each line", "invalid_variable_error")
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
