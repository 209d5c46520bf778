"""A file of samples, one JSON object per line, as the body of ``POST /train``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from apollo_tp.cli.answers import RefusedError
from apollo_tp.coordinator.samples.lines import EXPECTED, malformed, numbered_lines
from apollo_tp.errors import RequestError


class SampleFile:
    """The samples of a file, each one JSON object. ``-`` is standard input.

    Raises RefusedError, naming the line, unless each is an object in UTF-8, and OSError.
    """

    def __init__(self, path: Path) -> None:
        self._name = "standard input" if str(path) == "-" else str(path)
        self.samples: list[msgspec.Raw] = []
        self._line_numbers: list[int] = []
        # standard input by its number: sys.stdin is None if the shell closed it
        with open(0 if str(path) == "-" else path, "rb", closefd=str(path) != "-") as lines:
            try:
                for number, line in numbered_lines(lines):
                    self._check(line, number)
                    self.samples.append(msgspec.Raw(line))
                    self._line_numbers.append(number)
            except RequestError as error:
                raise RefusedError(f"{self._name}, {error}") from error
        if not self.samples:
            raise RefusedError(f"{self._name}, line 1: got no samples, expected one JSON object per line")

    def _check(self, content: bytes, number: int) -> None:
        try:
            content.decode()
            msgspec.json.decode(content, type=dict)
            return
        except msgspec.ValidationError as error:
            got = f"a wrong value ({error})"
        except ValueError as error:
            known = malformed(content)
            got = f"malformed JSON ({str(error).removeprefix('JSON is malformed: ')}{'; ' * bool(known)}{known})"
        except RecursionError:
            got = "too deeply nested JSON"
        raise RefusedError(f"{self._name}, line {number}: got {got}, expected {EXPECTED}")

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add the file, and the line of the sample that the coordinator names, to its refusals."""
        try:
            yield
        except RefusedError as error:
            where = re.match(r"samples\[(\d+)\]", error.field or "")
            if where is None or int(where[1]) >= len(self._line_numbers):
                raise
            line = self._line_numbers[int(where[1])]
            raise RefusedError(f"{self._name}, line {line}: {error}", error.field) from error
