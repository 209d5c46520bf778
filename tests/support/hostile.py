"""Damaged requests for the coordinator: JSON values changed at random, and bytes of whole HTTP requests."""

from __future__ import annotations

import copy
import random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e-300, float("nan"), float("inf"), "", "a",
    "\x00", "\ud800", "\u202e", "../../etc/passwd", "file-" + "0" * 24, "x" * 5_000, [], {}, [[]], [None], {"": None},
    [0] * 2_000, "true", "1", ["messages"], {"type": "supervised"},
]  # fmt: skip
"""Values that a field may be replaced by. NaN, infinities and half surrogates are sent as Python's json writes them."""
KEYS = ["samples", "epochs", "id", "type", "method", "seed", "metadata", "content", "role", "weight", "", "__proto__"]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += _places(part, (*path, key))
    return found


def _value(draw: random.Random) -> Any:
    """One of VALUES; a copy, since the next change may be to a part of it."""
    return copy.deepcopy(draw.choice(VALUES))


def damaged_value(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which one to three parts are replaced, removed, repeated, nested or put in."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        *path, last = draw.choice(_places(value)[1:] or [("",)])
        parent = value
        for key in path:
            parent = parent[key]
        if not isinstance(parent, dict | list) or (isinstance(parent, dict) and last not in parent):
            return _value(draw)
        match draw.randrange(5):
            case 0 | 1:
                parent[last] = _value(draw)
            case 2:
                del parent[last]
            case 3 if isinstance(parent, dict):
                parent[draw.choice(KEYS)] = _value(draw)
            case 3:
                parent += [parent[last]] * draw.choice([1, 50])
            case 4:
                for _ in range(draw.choice([1, 60])):
                    parent[last] = [parent[last]]
    return value


def raw_request(method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    """A whole HTTP/1.1 request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
