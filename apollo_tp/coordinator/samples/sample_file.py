"""A job's samples on disk: msgpack records in one file with an index at its end, written once, read a batch at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from apollo_tp.errors import ApolloTpError
from apollo_tp.runtime.owned_folder import fsync
from apollo_tp.wire.commands import Sample

T = TypeVar("T")
_OFFSET = struct.Struct("<Q")
_FOOTER = struct.Struct("<QQ8s")  # where the index begins, number of records, magic
_MAGIC = b"apollo01"


class Pair(msgspec.Struct, frozen=True):
    """A preference pair before its reference log-probabilities are known."""

    preferred: Sample
    rejected: Sample


class Prompt(msgspec.Struct, frozen=True):
    """A prompt of a reinforcement job: its tokens with the generation prompt, its last message, and the whole line, of which
    graders see the fields."""

    token_ids: list[int]
    last_message: str
    item: dict[str, Any]


class SamplesError(ApolloTpError):
    """A file of samples cannot be read."""


def write_records(path: Path, records: Iterable[object]) -> int:
    """Write records to ``path``, completely or not at all (mode 0600, fsync, rename). Returns their number."""
    encoder, offsets, position = msgspec.msgpack.Encoder(), [], 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
            for record in records:
                data = encoder.encode(record)
                offsets.append(position)
                position += file.write(data)
            file.write(b"".join(_OFFSET.pack(offset) for offset in (*offsets, position)))
            file.write(_FOOTER.pack(position, len(offsets), _MAGIC))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return len(offsets)


def read_records(path: Path, indices: Sequence[int], type: type[T]) -> list[T]:
    """The records at these positions. Raises SamplesError if the file is damaged or has no such record, OSError if it cannot
    be read."""
    try:
        return _read(path, indices, msgspec.msgpack.Decoder(type))
    except (struct.error, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise SamplesError(f"{path}: got {error}, expected a complete file of samples; send the job again") from error


def _read(path: Path, indices: Sequence[int], decoder: msgspec.msgpack.Decoder[T]) -> list[T]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _FOOTER.size))
        start, count, magic = _FOOTER.unpack(file.read(_FOOTER.size))
        if magic != _MAGIC or start + (count + 1) * _OFFSET.size + _FOOTER.size != size:
            raise ValueError(f"{size} bytes of another kind")
        records = []
        for index in indices:
            if not 0 <= index < count:
                raise ValueError(f"{count} records without number {index}")
            file.seek(start + index * _OFFSET.size)
            begin, end = struct.unpack("<QQ", file.read(2 * _OFFSET.size))
            file.seek(begin)
            records.append(decoder.decode(file.read(end - begin)))
    return records
