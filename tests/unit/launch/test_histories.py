"""Which replica the others are filled from, and replicas that were trained apart."""

from __future__ import annotations

import pytest

from apollo_tp.checkpoint.lineage import Lineage
from apollo_tp.errors import ReplicaError
from apollo_tp.launch.histories import History, source_of

LABELS = ["a on h", "b on h"]
FRESH = History(False, Lineage())
FOURTH = History(True, Lineage(4, 4, "/c", "job", 2))
FIFTH = History(True, Lineage(5, 5, "/c", "job", 3))
SAVED = History(True, Lineage(5, 5, "/d", "job", 3))


@pytest.mark.parametrize(
    ("histories", "source"),
    [
        ([FRESH, FRESH], None),
        ([History(False, Lineage(), "a@1"), History(False, Lineage(), "b@2")], None),
        ([FIFTH, FIFTH], None),
        ([FIFTH, FRESH], 0),
        ([FRESH, FIFTH], 1),
        ([FOURTH, FIFTH], 1),
        ([FIFTH, SAVED], 0),
        ([History(False, Lineage(9, checkpoint="/e")), FIFTH], 1),
    ],
    ids=[
        "new",
        "of two servers",
        "same",
        "b is new",
        "a is new",
        "killed between records",
        "killed after a save",
        "other folder",
    ],
)
def test_a_new_server_is_filled(histories: list[History], source: int | None) -> None:
    assert source_of(histories, LABELS) == source


@pytest.mark.parametrize(
    "other",
    [
        History(True, Lineage(2, 2, "/c", "job", 1)),
        History(True, Lineage(5, 5, "/c", "another", 3)),
        History(True, Lineage(4, 4, "/other", "job", 2)),
    ],
)
def test_no_weights_of_another_history_are_overwritten(other: History) -> None:
    with pytest.raises(ReplicaError, match=r"on a on h, last trained by job .* expected that of b on h|b on h.*a on h"):
        source_of([other, FIFTH], LABELS)
