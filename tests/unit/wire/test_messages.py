"""The wire between coordinator, ranks and the server's plugin: every message of every protocol, and what is none."""

from __future__ import annotations

import contextlib
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_tp.errors import FrameError
from apollo_tp.wire import codec, commands
from tests.support.figures import step_figures
from tests.support.frames import DIRECTIONS, KINDS, NOT_UTF8, damaged, example, frame_of


@pytest.mark.parametrize(("direction", "kind"), KINDS, ids=[kind.__name__ for _, kind in KINDS])
def test_every_message_survives_the_wire(direction: str, kind: type[msgspec.Struct]) -> None:
    """With its type, and all of its fields: each has a value that is not its default."""
    message = example(kind, 1)
    again = codec.decode(codec.encode(message), DIRECTIONS[direction])
    assert type(again) is kind
    assert again == message
    for name, default in zip(reversed(kind.__struct_fields__), reversed(kind.__struct_defaults__), strict=False):
        assert getattr(again, name) != default, name


def test_a_message_of_the_other_direction_is_refused() -> None:
    """A confused peer cannot be taken for rank 0, nor for a server."""
    for direction, kind in KINDS:
        for other, union in DIRECTIONS.items():
            if kind not in (typing.get_args(union) or (union,)):
                with pytest.raises(FrameError, match="expected one of"):
                    codec.decode(frame_of(kind), union)
                assert other != direction


def test_no_figure_of_a_step_may_be_left_out() -> None:
    """Neither by the trainer nor on the wire: no default hides that one was lost."""
    assert commands.StepFigures.__struct_defaults__ == ()
    complete = msgspec.to_builtins(step_figures())
    for name in complete:
        left = {key: value for key, value in complete.items() if key != name}
        with pytest.raises(FrameError, match=name):
            codec.decode(msgspec.msgpack.encode({"type": "StepDone", "id": "j/1", "figures": left}), commands.AnyReply)


@pytest.mark.parametrize(("direction", "kind"), KINDS, ids=[kind.__name__ for _, kind in KINDS])
def test_damaged_messages_raise_one_error(direction: str, kind: type[msgspec.Struct]) -> None:
    """Whatever bytes of it were changed: a receiver catches FrameError and nothing else."""
    refused = 0
    for frame in damaged(frame_of(kind), 3000, seed=len(kind.__name__)):
        try:
            codec.decode(frame, DIRECTIONS[direction])
        except FrameError:
            refused += 1
    assert refused > 1000, "the damage was none"


@pytest.mark.parametrize("nest", [b"\x91", b"\x81\xa1x"], ids=["lists", "maps"])
@pytest.mark.parametrize(("direction", "kind"), KINDS, ids=[kind.__name__ for _, kind in KINDS])
def test_nesting_without_end_raises_the_same_error(direction: str, kind: type[msgspec.Struct], nest: bytes) -> None:
    """In a field that no message has, where msgspec's own error is a RecursionError."""
    head = b"\x82\xa4type" + msgspec.msgpack.encode(kind.__name__) + b"\xa7unknown"
    with pytest.raises(FrameError):
        codec.decode(head + nest * 100_000, DIRECTIONS[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_text_that_is_not_utf8_raises_the_same_error(direction: str) -> None:
    """Where msgspec's own error is a UnicodeDecodeError."""
    with pytest.raises(FrameError):
        codec.decode(NOT_UTF8, DIRECTIONS[direction])


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_raises_one_error(frame: bytes) -> None:
    for union in DIRECTIONS.values():
        with contextlib.suppress(FrameError):
            codec.decode(frame, union)
