"""A file of samples as the body of ``POST /train``: JSON Lines, a JSON array, Parquet, or a saved Hugging Face dataset."""

from __future__ import annotations

import codecs
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from apollo_tp.cli.answers import RefusedError
from apollo_tp.coordinator.samples.lines import EXPECTED, malformed, numbered_lines
from apollo_tp.errors import RequestError

DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
"""One of them is in a folder that ``datasets`` has saved."""
PARQUET = b"PAR1"
PEEKED_BYTES = 4096
ROWS_AT_ONCE = 256


class SampleFile:
    """The samples of a file, each one JSON object. ``-`` is standard input.

    Raises RefusedError, naming the line, or the number of the sample where there are no lines, unless each is an object in
    UTF-8; RefusedError for a table without the package that reads it; and OSError.
    """

    def __init__(self, path: Path) -> None:
        self._name = "standard input" if str(path) == "-" else str(path)
        self._unit = "line"
        self.samples: list[msgspec.Raw] = []
        self._numbers: list[int] = []
        try:
            for number, line in self._numbered(path):
                self._check(line, number)
                self.samples.append(msgspec.Raw(line))
                self._numbers.append(number)
        except RequestError as error:
            raise RefusedError(f"{self._name}, {error}") from error
        if not self.samples:
            raise RefusedError(
                f"{self._name}, {self._unit} 1: got no samples, expected one JSON object per {self._unit}"
            )

    def _numbered(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """The samples as JSON, with their numbers in the file."""
        if any((path / name).is_file() for name in DATASET_FILES):
            self._unit = "row"
            yield from enumerate(_rows_of_dataset(path), 1)
            return
        # standard input by its number: sys.stdin is None if the shell closed it
        with open(0 if str(path) == "-" else path, "rb", closefd=str(path) != "-") as file:
            begin = file.peek(PEEKED_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
            if begin.startswith(b"["):
                self._unit = "sample"
                yield from enumerate(_elements(file.read().removeprefix(codecs.BOM_UTF8), self._name), 1)
            elif begin.startswith(PARQUET):
                self._unit = "row"
                yield from enumerate(_rows_of_parquet(path), 1)
            else:
                yield from numbered_lines(file)

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
        raise RefusedError(f"{self._name}, {self._unit} {number}: got {got}, expected {EXPECTED}")

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add the file, and the line of the sample that the coordinator names, to its refusals."""
        try:
            yield
        except RefusedError as error:
            where = re.match(r"samples\[(\d+)\]", error.field or "")
            if where is None or int(where[1]) >= len(self._numbers):
                raise
            number = self._numbers[int(where[1])]
            raise RefusedError(f"{self._name}, {self._unit} {number}: {error}", error.field) from error


def _elements(content: bytes, name: str) -> list[bytes]:
    """The elements of a JSON array, as they are written."""
    try:
        return [bytes(element) for element in msgspec.json.decode(content, type=list[msgspec.Raw])]
    except ValueError as error:
        raise RefusedError(
            f"{name}: got malformed JSON ({error}), expected an array of objects, or {EXPECTED}"
        ) from error


def _rows_of_parquet(path: Path) -> Iterator[bytes]:
    """The rows of a Parquet file as JSON objects, some at a time."""
    file = _package("pyarrow.parquet", path, "a Parquet file").ParquetFile(path)
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
        yield from map(msgspec.json.encode, batch.to_pylist())


def _rows_of_dataset(path: Path) -> Iterator[bytes]:
    """The rows of a folder that ``datasets`` has saved as JSON objects, one at a time."""
    try:
        dataset = _package("datasets", path, "a folder").load_from_disk(str(path))
    except FileNotFoundError as error:
        raise RefusedError(
            f"{path}: got a folder ({error}), expected a file, or one of Dataset.save_to_disk"
        ) from error
    if isinstance(dataset, dict):
        splits = ", ".join(str(path / split) for split in dataset)
        raise RefusedError(f"{path}: got a dataset with several splits, expected one of them: {splits}")
    yield from map(msgspec.json.encode, dataset)


def _package(name: str, path: Path, kind: str) -> Any:
    """The module ``name``, which this package does not depend on."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RefusedError(
            f"{path}: got {kind} and no package {package}, expected it to be installed: pip install {package}; or a file of "
            f"{EXPECTED}"
        ) from error
