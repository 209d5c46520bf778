"""How every message between processes is encoded: msgpack of a msgspec struct with a type tag. Nothing is pickled."""

from __future__ import annotations

import functools
from typing import Any, get_args

import msgspec

from apollo_tp.errors import DECODE_ERRORS, FrameError

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes, union: Any) -> Any:
    """The message in ``frame``, one of the struct types of ``union`` (for example ``commands.AnyReply``).

    Raises FrameError for every other content, whatever is wrong with it: a receiver has nothing else to catch.
    """
    try:
        return _decoder(union).decode(frame)
    except DECODE_ERRORS as error:
        names = ", ".join(kind.__name__ for kind in get_args(union))
        raise FrameError(f"got {len(frame)} bytes that are no message ({error}), expected one of {names}") from None


@functools.cache
def _decoder(union: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(union)
