"""Messages between ranks, of every size, arrive whole."""

from __future__ import annotations

import random

import pytest

from apollo_tp.distributed.control import COMMAND_BYTES, VERDICT_BYTES, Control
from apollo_tp.distributed.tp_group import TPGroup
from tests.support.ranks import run_ranks


def _payload(num_bytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def _check_exchange(tp: TPGroup) -> None:
    control = Control(tp.rank, tp.size)
    for size in (0, 1, COMMAND_BYTES - 1, COMMAND_BYTES, COMMAND_BYTES + 1, 3 * COMMAND_BYTES, 5):
        assert control.broadcast(_payload(size, 0) if tp.rank == 0 else b"") == _payload(size, 0)
    sizes = (0, 1, VERDICT_BYTES, VERDICT_BYTES + 1, 3 * VERDICT_BYTES)
    for shift in range(len(sizes)):
        lengths = [sizes[(rank + shift) % len(sizes)] for rank in range(tp.size)]
        expected = [_payload(n, rank) for rank, n in enumerate(lengths)]
        assert control.gather(expected[tp.rank]) == expected
    assert control.gather(b"\0\0") == [b"\0\0"] * tp.size


@pytest.mark.parametrize("size", [1, 3])
def test_messages_arrive_whole(size: int) -> None:
    """Around the length that goes in one collective, short after long, different on each rank, zeros at the end."""
    run_ranks(_check_exchange, size)
