"""Messages between ranks, of every size, arrive complete; what fails on one rank fails on all."""

from __future__ import annotations

import random

import pytest
import torch

from apollo_tp.distributed.control import COMMAND_BYTES, VERDICT_BYTES, ComputeControl, Control
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, RankFailedError
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
def test_messages_of_every_size_arrive(size: int) -> None:
    """Around the length that goes in one collective, short after long, different on each rank, zeros at the end."""
    run_ranks(_check_exchange, size)


ERRORS: dict[str, Exception] = {
    "of this package": ConfigError("no room"),
    "any other": KeyError("no room"),
    "without a text": AssertionError(),
    "a file's name that is not Unicode": FileNotFoundError(2, "no room", b"/a\xff".decode(errors="surrogateescape")),
    "long": ValueError("no room " * VERDICT_BYTES),
}


def _fail_on(tp: TPGroup, over_compute_group: bool, failing: tuple[int, ...]) -> list[str]:
    """What this rank raises, per kind of error; "" if nothing."""
    control = ComputeControl(tp, torch.device("cpu")) if over_compute_group else Control(tp.rank, tp.size)
    raised = []
    for error in ERRORS.values():
        try:
            with control.agree():
                if tp.rank in failing:
                    raise error
            raised.append("")
        except RankFailedError as caught:
            raised.append(f"{caught.rank}: {caught}")
        except Exception as caught:  # noqa: BLE001
            raised.append("own error" if caught is error else repr(caught))
    return raised


@pytest.mark.parametrize("over_compute_group", [False, True])
@pytest.mark.parametrize("failing", [(), (1,), (1, 2), (0, 1, 2)])
def test_what_fails_on_one_rank_fails_on_all(over_compute_group: bool, failing: tuple[int, ...]) -> None:
    """The ranks that failed raise their own error, the others name the first of them. Else they would wait for it in the
    next collective."""
    for rank, raised in enumerate(run_ranks(_fail_on, 3, over_compute_group, failing)):
        for error, text in zip(ERRORS.values(), raised, strict=True):
            if rank in failing:
                assert text == "own error"
            else:
                assert text.startswith(f"1: rank 1 failed: {type(error).__name__}: " if failing else ""), text
                assert bool(text) == bool(failing)
