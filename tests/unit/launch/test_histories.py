"""Which replica the others are filled from, and replicas that were trained apart."""

from __future__ import annotations

import msgspec
import pytest

from apollo_tp.checkpoint.lineage import RECORD_BYTES, Departure, Lineage
from apollo_tp.errors import ReplicaError
from apollo_tp.launch.histories import MAX_AWAY, History, partners, source_of

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


A, B = "a@1.1", "b@2.2"
BEFORE = Lineage(4, 4, "/c", "job", 2, life=A, partners={A: None, B: None})


def _went_on(record: Lineage, present: list[str], steps: int) -> Lineage:
    record = msgspec.structs.replace(record, partners=partners(record, present))
    return msgspec.structs.replace(
        record,
        weight_version=record.weight_version + steps,
        step_count=record.step_count + steps,
        last_job_step=record.last_job_step + steps,
    )


@pytest.mark.parametrize("behind", [0, 1])
def test_a_replica_that_was_away_is_filled(behind: int) -> None:
    """Its server has lived on, with the weights that it had when the others went on without it, or missed the last step."""
    newest = _went_on(BEFORE, [A], 3)
    assert newest.partners == {B: Departure(4, "job", 2), A: None}
    theirs = _went_on(BEFORE, [A, B], -behind)
    assert source_of([History(True, theirs, B), History(True, newest, A)], LABELS) == 1
    later = _went_on(_went_on(newest, [A], 1), [A], 0)
    assert source_of([History(True, later, A), History(True, theirs, B)], LABELS) == 0, "it stays away"


@pytest.mark.parametrize("others", [1, 5])
def test_a_replica_that_was_trained_meanwhile_is_refused(others: int) -> None:
    """Whichever side made more steps."""
    left, right = _went_on(BEFORE, [A], 2), _went_on(BEFORE, [B], others)
    with pytest.raises(ReplicaError, match="they were trained apart"):
        source_of([History(True, left, A), History(True, right, B)], LABELS)


def test_one_of_another_history_is_refused_though_it_has_the_name() -> None:
    newest = _went_on(BEFORE, [A], 3)
    other = msgspec.structs.replace(_went_on(BEFORE, [B], 0), life="c@3.3")
    with pytest.raises(ReplicaError, match="they were trained apart"):
        source_of([History(True, newest, A), History(True, other, B)], LABELS)


def test_the_record_has_room_for_all_that_are_away() -> None:
    """A server that is started again and again leaves one entry each time."""
    record = msgspec.structs.replace(BEFORE, checkpoint="/x" * 500, last_job_id="j" * 60)
    for number in range(2 * MAX_AWAY):
        record = _went_on(record, [A, f"{'b' * 60}@{10**9 + number}.{10**12}"], 1)
    assert len(record.partners) == MAX_AWAY + 2
    assert len(msgspec.json.encode(record)) < RECORD_BYTES
