"""What is left of a group once a rank has failed: everybody joins again, and collectives count again."""

from __future__ import annotations

import datetime

import pytest
import torch

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CollectiveError
from tests.support.ranks import run_ranks

TIMEOUT = datetime.timedelta(seconds=60)


def _leave_and_join(world: TPGroup) -> list[float]:
    """A checked sum and a checked gather of a group that was left and joined again, twice."""
    tp, found = TPGroup(world.rank, world.size), []
    tp.form("gloo", TIMEOUT)
    for _ in range(2):
        tp.dissolve()
        with pytest.raises(CollectiveError, match="of aborted work"):
            tp._check("a sum", float(tp.size), float(tp.size))
        tp.form("gloo", TIMEOUT)
        found.append(tp.sum_checked(torch.ones(3), "a sum").sum().item())
        found.append(tp.gather_checked(torch.ones(3), "a gather").sum().item())
        found.append(tp.intact(torch.device("cpu")).item())
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_that_was_joined_again_is_whole(size: int) -> None:
    """One rank alone too, which has no process group but is marked as aborted when it fails."""
    assert run_ranks(_leave_and_join, size) == [[3.0 * size, 3.0 * size, 1.0] * 2] * size
