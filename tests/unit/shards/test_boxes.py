"""replicated_parts against a check of every single index."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_tp.shards.boxes import Box, replicated_parts

EXTENT = 24


@st.composite
def _ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Disjoint ascending ranges of [0, EXTENT), some of them empty."""
    bounds = sorted(draw(st.lists(st.integers(0, EXTENT), max_size=8)))
    ranges = list(zip(bounds[::2], bounds[1::2], strict=False))
    return [
        (start, stop) for i, (start, stop) in enumerate(ranges) if i == 0 or start > ranges[i - 1][1] or start == stop
    ]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(_ranges(), min_size=1, max_size=4))
def test_parts_are_what_a_check_of_every_index_finds(ranges: list[list[tuple[int, int]]]) -> None:
    """Each local index is in the part whose ranks are all the holders of its global index, or in none if only one is."""
    held = [[i for start, stop in mine for i in range(start, stop)] for mine in ranges]
    for rank, mine in enumerate(held):
        expected = {
            local: holders
            for local, index in enumerate(mine)
            if len(holders := tuple(r for r, other in enumerate(held) if index in other)) > 1
        }
        parts = replicated_parts(ranges, rank)
        found = {local: part.ranks for part in parts for local in range(part.start, part.start + part.length)}
        assert found == expected
        assert sum(part.length for part in parts) == len(expected), "parts overlap"
        assert all(part.length for part in parts), "a part without elements, which no other rank has"


def test_the_key_and_value_rows_of_a_fused_tensor_are_found() -> None:
    """4 ranks, 2 KV heads of 8 rows: ranks 0 and 1 share the first head's key and value rows, but no query rows."""
    ranges = [
        [(0, 16), (64, 72), (80, 88)],
        [(16, 32), (64, 72), (80, 88)],
        [(32, 48), (72, 80), (88, 96)],
        [(48, 64), (72, 80), (88, 96)],
    ]
    (part,) = replicated_parts(ranges, 1)
    assert (part.start, part.length, part.ranks) == (16, 16, (0, 1))
    # On rank 3 the query rows run on into the key rows of the first of two heads when there is one head fewer.
    merged = [[(0, 16), (32, 48)], [(16, 48)]]
    (part,) = replicated_parts(merged, 1)
    assert (part.start, part.length, part.ranks) == (16, 16, (0, 1))


_SPANS = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.lists(st.tuples(_SPANS, _SPANS), min_size=1, max_size=3))
def test_an_intersection_has_what_both_boxes_have(spans: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    first, second = (Box(*map(tuple, zip(*(span[which] for span in spans), strict=True))) for which in (0, 1))
    common = first.intersection(second)
    assert _elements(common) == _elements(first) & _elements(second)
    if common is not None:
        assert [part.start for part in common.slices(first.offset)] == [
            a - b for a, b in zip(common.offset, first.offset, strict=True)
        ]


def _elements(box: Box | None) -> set[tuple[int, ...]]:
    if box is None:
        return set()
    return set(itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))
