"""A message of every type of every protocol, and damaged frames of it."""

from __future__ import annotations

import functools
import random
import typing
from types import UnionType
from typing import Any

import msgspec

from apollo_tp.wire import codec, commands, tunnel, update_lock

DIRECTIONS: dict[str, Any] = {
    "commands": commands.AnyCommand,
    "replies": commands.AnyReply,
    "tunnel up": tunnel.TunnelUp,
    "tunnel down": tunnel.TunnelDown,
    "lock requests": update_lock.SyncRequest,
    "lock answers": update_lock.SyncAnswer,
}
KINDS = [(name, kind) for name, union in DIRECTIONS.items() for kind in typing.get_args(union) or (union,)]
NOT_UTF8 = bytes.fromhex("82a474797065a1ffa2696401")  # {"type": "\xff", "id": 1}


def example(kind: Any, seed: int) -> Any:
    """Any value of a field's type, with every field of a message set to another one than its default."""
    again = functools.partial(example, seed=seed + 1)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return kind(**{name: example(hints[name], seed + i) for i, name in enumerate(kind.__struct_fields__, 1)})
    if origin in (list, dict):
        return origin([again(a) for a in arguments] if origin is list else [tuple(map(again, arguments))])
    if origin is tuple:
        return tuple(map(again, arguments))
    if origin is typing.Literal:
        return arguments[-1]
    if origin in (UnionType, typing.Union):
        return again(next(a for a in arguments if a is not type(None)))
    return {str: f"text {seed} \u00e9", bytes: b"\xff%d" % seed, int: 100 + seed, float: seed + 0.25, bool: True}[kind]


def frame_of(kind: type[msgspec.Struct]) -> bytes:
    return codec.encode(example(kind, 1))


def damaged(frame: bytes, number: int, seed: int) -> list[bytes]:
    """``number`` variants of a frame: bytes exchanged, cut out, put in, cut off."""
    draw, result = random.Random(seed), []
    for _ in range(number):
        copy = bytearray(frame)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(copy) + 1)
            match draw.randrange(4):
                case 0:
                    copy[at : at + 1] = draw.randbytes(1)
                case 1:
                    del copy[at : at + draw.randint(1, 4)]
                case 2:
                    copy[at:at] = draw.choice(
                        [b"\xff", b"\xc1", b"\x91" * 50, b"\xdd\xff\xff\xff\xff", draw.randbytes(3)]
                    )
                case 3:
                    del copy[at:]
        result.append(bytes(copy))
    return result
