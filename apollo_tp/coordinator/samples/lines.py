"""The lines of a file of samples: one JSON object each, in UTF-8. Files of another kind are named for what they are."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from apollo_tp.errors import refuse

MAX_SAMPLE_BYTES = 4 * 2**20
EXPECTED = "one object in UTF-8 per line (JSON Lines)"
_BEGINNINGS = {
    b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive", b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database", b"%PDF": "a PDF file", b"\xff\xfe\0\0": "UTF-32 text",
    b"\0\0\xfe\xff": "UTF-32 text", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"PK\x05\x06": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive", b"\x04\x22\x4d\x18": "an lz4 archive", b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file", b"FEA1": "an Arrow file", b"\xd0\xcf\x11\xe0": "an Excel file", b"Obj\x01": "an Avro file",
}  # fmt: skip
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_SURROGATES = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def numbered_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank with their numbers, from 1 on, without a byte order mark.

    Raises RequestError, naming the kind of the file, if it is no file of lines of JSON, and for a line of more than
    MAX_SAMPLE_BYTES.
    """
    number, first = 0, True
    while line := file.readline(MAX_SAMPLE_BYTES + 1):
        number += 1
        if number == 1 and (kind := kind_of(line)):
            raise refuse("line 1", kind, EXPECTED + (", unpacked" if "archive" in kind else ""))
        while line.startswith(codecs.BOM_UTF8):  # files that were joined have one each
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_SAMPLE_BYTES:
            got = f"a line of more than {MAX_SAMPLE_BYTES} bytes"
            raise refuse(f"line {number}", got, f"{EXPECTED}, each of at most {MAX_SAMPLE_BYTES} bytes")
        if not line.strip():
            continue
        if first:
            _check_first(line, number)
            first = False
        yield number, line


def kind_of(data: bytes) -> str:
    """What a file or body is that begins so; empty if it may be text in UTF-8."""
    kind = next((kind for begin, kind in _BEGINNINGS.items() if data.startswith(begin)), "")
    if kind or b"\0" not in data[:4]:
        return kind
    if not data[:4].strip(b"\0"):
        return "a binary file"
    return "UTF-32 text" if data[:4].count(b"\0") == 3 else "UTF-16 text"


def _check_first(line: bytes, number: int) -> None:
    """Refuse a first line that shows a text of another format."""
    text = line.strip()
    where = f"line {number}"
    if text.startswith(b"["):
        raise refuse(where, "a JSON array", f"{EXPECTED}, without the brackets and the commas between the objects")
    if text == b"{" or (text.startswith(b"{") and _is_incomplete(text)):
        raise refuse(where, "an object over several lines (pretty-printed JSON)", EXPECTED)
    if not text.startswith(b"{"):
        separated = any(each in text for each in (b",", b";", b"\t")) and text.isascii() and not text.startswith(b'"{')
        kind = kind_of(text) or ("what may be a CSV file" if separated else "what is no JSON object")
        raise refuse(where, f"{kind} ({text[:40]!r})"[:120], EXPECTED)


def _is_incomplete(text: bytes) -> bool:
    """Whether the text is valid JSON up to its end, where more should follow."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip()) and text.endswith((b",", b"{", b"[", b":"))
    except (ValueError, RecursionError):
        pass
    return False


def malformed(line: bytes) -> str:
    """What is wrong with a line that is not JSON, where it is a known mistake; else an empty string."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        return f"a byte that is not UTF-8 ({line[error.start]:#04x}, byte {error.start + 1} of the line)"
    if text == "\x1a":
        return "the end-of-file character of DOS (Ctrl-Z)"
    if half := _SURROGATE.search(_SURROGATES.sub("", text)):
        return f"half a character ({half[0]}, one of a pair of surrogates)"
    if re.search(r"[:,\[]\s*-?(NaN|Infinity)\b", text):
        return "NaN or Infinity, which JSON does not have"
    if text.endswith("},"):
        return "a comma after the object"
    if text.startswith("{'"):
        return "an object of Python with single quotes"
    if re.search(r"\}\s*\{", text):
        return "more than one object"
    return ""
