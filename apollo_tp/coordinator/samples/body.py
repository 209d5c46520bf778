"""The ``samples`` of a request's body, decoded one after the other.

Decoding a body at once takes up to forty times its size in memory and holds the GIL for seconds, during which no request is
answered. So only the brackets and strings of the body are looked at first, and each sample is decoded when it is needed.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from apollo_tp.coordinator.samples.forms import read_sample
from apollo_tp.coordinator.samples.lines import MAX_SAMPLE_BYTES
from apollo_tp.coordinator.samples.schema import Body, SampleBody, ScoreOptions, TrainBody
from apollo_tp.coordinator.samples.unique_keys import next_structure
from apollo_tp.errors import RequestError, refuse

B = TypeVar("B", TrainBody, ScoreOptions)

MAX_VALUES = 10_000_000
"""Strings, arrays and objects in a body."""
MAX_GAP = 64 * 1024
"""White space between two values. A search holds the GIL to its end."""
_COMMA = re.compile(rb"\s*+,\s*+")
_SPACE = re.compile(rb"\s*+")
_KEY_END = re.compile(rb"\s*+:\s*+")


@dataclass(frozen=True)
class Samples:
    """The elements of the array ``samples`` in ``data``: ``bounds`` has where each begins and ends."""

    data: Body
    bounds: array[int]

    def __len__(self) -> int:
        return len(self.bounds) // 2

    def __iter__(self) -> Iterator[SampleBody]:
        """Decode each sample. Raises RequestError naming it."""
        for index, element in enumerate(self.elements()):
            yield read_sample(element, SampleBody, f"samples[{index}].")

    def elements(self) -> Iterator[bytes]:
        """Each sample as it is written."""
        for index in range(len(self)):
            yield self.data[self.bounds[2 * index] : self.bounds[2 * index + 1]]


def read_body(data: Body, kind: type[B], max_samples: int) -> tuple[B, Samples | None]:
    """The body without its ``samples``, and these; None if it has none. Raises RequestError."""
    found = _find_samples(data, max_samples)
    rest = len(data) if found is None else len(data) - (found[1] - found[0])
    if rest > MAX_SAMPLE_BYTES:
        raise _too_large("body")
    if found is None:
        body = read_sample(data[:], kind)
        if body.samples is not None:
            raise refuse("samples", 'an array that cannot be found as the text "samples"', "this name without escapes")
        return body, None
    begin, end, bounds = found
    if not bounds:
        raise refuse("samples", "an empty array", "at least one sample")
    return read_sample(data[:begin] + b"null" + data[end:], kind), Samples(data, bounds)


def _find_samples(data: Body, max_samples: int) -> tuple[int, int, array[int]] | None:
    """Where the array begins and ends, and its elements; None if the body has none that is well-formed."""
    depth, begin, element, bounds = 0, -1, 0, array("Q")
    key_end, end = -1, -1
    for token, at, after in _structure(data):
        if token == ord('"'):
            is_samples = depth == 1 and data[at:after] == b'"samples"'
            if is_samples and (colon := _KEY_END.match(data, after, after + MAX_GAP)):
                key_end = colon.end()
        elif token in b"[{":
            depth += 1
            if depth == 2 and at == key_end and token == ord("["):
                if begin >= 0:
                    raise refuse("samples", "it twice", "it once")
                begin = at
            elif depth == 3 and begin >= 0 and end < 0:
                element = at
                _check_gap(data, bounds, begin, element)
        else:
            depth -= 1
            if depth == 2 and begin >= 0 and end < 0:
                bounds.extend((element, after))
                _check_element(bounds, max_samples)
            elif depth == 1 and begin >= 0 and end < 0:
                end = after
                _check_gap(data, bounds, begin, at)
    return (begin, end, bounds) if end >= 0 else None


def _structure(data: Body) -> Iterator[tuple[int, int, int]]:
    """Each bracket and string: its first byte, where it begins, and where it ends. A string without end is the last."""
    after, count = 0, 0
    while (at := next_structure(data, after)) >= 0:
        after = at + 1
        if data[at] == ord('"'):
            # not by a regular expression, which would hold the GIL for the whole string
            after = data.find(b'"', after) + 1
            while after and _is_escaped(data, after - 1):
                if after - at > MAX_SAMPLE_BYTES:
                    raise _too_large("body")
                after = data.find(b'"', after) + 1
            if not after:
                return
        yield data[at], at, after
        if (count := count + 1) > MAX_VALUES:
            raise refuse("body", f"more than {MAX_VALUES} values", "fewer; send files or several requests")


def _is_escaped(data: Body, at: int) -> bool:
    before = at
    while data[before - 1] == ord("\\"):
        before -= 1
    return (at - before) % 2 == 1


def _check_gap(data: Body, bounds: array[int], begin: int, here: int) -> None:
    """Raise RequestError unless nothing but a comma is between the last element of the array and ``here``."""
    last = bounds[-1] if bounds else begin + 1
    closing = data[here] in b"]}"
    pattern = _SPACE if closing or not bounds else _COMMA
    if here - last > MAX_GAP or not pattern.fullmatch(data, last, here):
        got = repr(data[last : min(here, last + 80)])[1:]
        raise refuse(f"samples[{len(bounds) // 2}]", got, "objects with commas between them", code="malformed_json")


def _check_element(bounds: array[int], max_samples: int) -> None:
    index, size = len(bounds) // 2 - 1, bounds[-1] - bounds[-2]
    if size > MAX_SAMPLE_BYTES:
        raise _too_large(f"samples[{index}]")
    if index >= max_samples:
        raise refuse("samples", f"more than {max_samples} samples", f"at most {max_samples}; send several requests")


def _too_large(field: str) -> RequestError:
    expected = f"at most {MAX_SAMPLE_BYTES} bytes in one sample"
    return refuse(field, f"more than {MAX_SAMPLE_BYTES} bytes", expected, status=413, code="sample_too_large")
