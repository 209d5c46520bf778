"""The wire between coordinator, ranks and the server's plugin."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_tp.wire import commands
from apollo_tp.wire import tunnel as tunnel_messages

SAMPLE = commands.Sample(token_ids=[1, 2], weights=[0.0, 1.0])
COMMANDS = [
    commands.Step(id="a/1", job_id="a", job_step=1, samples=[SAMPLE], learning_rate_scale=0.5),
    commands.PreferenceStep(
        id="a/2", job_id="a", job_step=2, pairs=[commands.PreferencePair(SAMPLE, SAMPLE, -1.0, -2.0)], beta=0.3
    ),
    commands.Score(id="s", samples=[SAMPLE]),
    commands.SaveCheckpoint(id="c", name="n"),
    commands.Shutdown(id="x", reason="done"),
    commands.Identify(id="i"),
]
REPLIES = [
    commands.ScoreDone(id="s", logprobs=[-1.0], weights=[1.0], num_correct=[1.0]),
    commands.CheckpointDone(id="c", path="/x", num_bytes=1, seconds=0.1, weight_version=2),
    commands.CommandFailed(id="a/1", rank=1, error="E", message="m", traceback="t"),
    commands.Heartbeat(weight_version=3, busy_with="a/1"),
    commands.Goodbye(reason="r", failed=True),
]
TUNNEL_UP = [
    tunnel_messages.TunnelRequest(1, "GET", "/x", b"a=1", [(b"a", b"b")]),
    tunnel_messages.TunnelBody(1, b"x", False),
    tunnel_messages.TunnelCancel(1),
]
TUNNEL_DOWN = [
    tunnel_messages.TunnelHead(1, 200, [(b"a", b"b")]),
    tunnel_messages.TunnelBody(1, b"x", True),
    tunnel_messages.TunnelAlive(1),
]


@pytest.mark.parametrize(
    ("messages", "encode", "decode"),
    [
        (COMMANDS, commands.encode, commands.decode_command),
        (REPLIES, commands.encode, commands.decode_reply),
        (TUNNEL_UP, tunnel_messages.encode_tunnel, tunnel_messages.decode_tunnel_up),
        (TUNNEL_DOWN, tunnel_messages.encode_tunnel, tunnel_messages.decode_tunnel_down),
    ],
)
def test_every_message_survives_the_wire(messages, encode, decode):
    """decode(encode(m)) == m, with its type, for every message of each direction."""
    for message in messages:
        again = decode(encode(message))
        assert again == message
        assert type(again) is type(message)


def test_a_command_is_no_reply():
    """A frame of one direction is refused in the other: a confused peer cannot be taken for rank 0."""
    for command in COMMANDS:
        with pytest.raises(msgspec.ValidationError):
            commands.decode_reply(commands.encode(command))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_raises_only_msgspec_errors(frame):
    """Any bytes either decode to a message or raise MsgspecError: nothing else has to be caught by a receiver."""
    for decode in (
        commands.decode_command,
        commands.decode_reply,
        tunnel_messages.decode_tunnel_up,
        tunnel_messages.decode_tunnel_down,
    ):
        with contextlib.suppress(msgspec.MsgspecError):
            decode(frame)
