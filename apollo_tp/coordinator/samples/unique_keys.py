"""Objects with the same key twice: msgspec, as most decoders, keeps the last one in silence. And JSON of very many values:
whatever decodes or writes it holds the GIL meanwhile."""

from __future__ import annotations

import contextlib
import mmap
import re

import msgspec

from apollo_tp.errors import refuse

MAX_DEPTH = 200
MAX_VALUES = 100_000
"""Strings, arrays and objects in one JSON text, and other values where they are no token ids."""
_IDS_DEPTH = 2
"""Token ids are in an array of the sample."""
_STRUCTURE = re.compile(rb'["{}\[\]]')
_KEY = re.compile(rb"[ \t\r\n]*+:")
_STEP = 2**20


def check_unique_keys(data: bytes, where: str = "") -> None:
    """Raise RequestError if an object in this JSON text has a key twice or is nested deeper than MAX_DEPTH, or if there are
    more than MAX_VALUES values.

    A walk over strings and brackets; what is no JSON is left to the decoder. It runs in Python, so that other threads run
    meanwhile however large the text is, and takes about a second for 100 MB of token ids or of long texts.
    """
    keys: list[set[bytes] | None] = []  # of the objects that are open; None for an array
    at, count = -1, 0
    while (at := next_structure(data, before := at + 1)) >= 0:
        char = data[at]
        count += 1 + (data.count(b",", before, at) if len(keys) > _IDS_DEPTH else 0)
        if count > MAX_VALUES:
            raise refuse(where.rstrip(".") or "body", f"more than {MAX_VALUES} values in one JSON text", "fewer",
                         status=413, code="too_many_values")  # fmt: skip
        if char == ord('"'):
            if (end := _string_end(data, at)) < 0:
                return
            if keys and (known := keys[-1]) is not None and _KEY.match(data, end + 1):
                _add(known, data[at : end + 1], where)
            at = end
        elif char in b"{[":
            keys.append(set() if char == ord("{") else None)
            if len(keys) > MAX_DEPTH:
                field = where.rstrip(".") or "body"
                raise refuse(field, f"malformed JSON (values nested deeper than {MAX_DEPTH} levels)", "a JSON object",
                             code="malformed_json")  # fmt: skip
        elif keys:
            keys.pop()
        else:
            return


def next_structure(data: bytes | mmap.mmap, at: int) -> int:
    """The next quote or bracket; -1 if there is none. In steps, since a search holds the GIL to its end."""
    while at < len(data):
        if found := _STRUCTURE.search(data, at, min(at + _STEP, len(data))):
            return found.start()
        at += _STEP
    return -1


def _string_end(data: bytes, at: int) -> int:
    """Where the quote is that ends the string whose first quote is at ``at``; -1 if it has no end."""
    end = at
    while (end := data.find(b'"', end + 1)) >= 0:
        back = end
        while data[back - 1] == ord("\\"):
            back -= 1
        if (end - back) % 2 == 0:
            return end
    return -1


def _add(keys: set[bytes], key: bytes, where: str) -> None:
    if b"\\" in key:
        with contextlib.suppress(msgspec.DecodeError, UnicodeError):  # spelled with escapes, it is the same key
            key = msgspec.json.encode(msgspec.json.decode(key, type=str))
    if key in keys:
        name = key.strip(b'"').decode(errors="replace")[:80]
        raise refuse(f"{where}{name}", "this key twice in one object", "each key once", code="duplicate_key")
    keys.add(key)
