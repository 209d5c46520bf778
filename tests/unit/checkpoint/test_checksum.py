"""Checksums of parts add up to that of the whole, however it is cut, and say when anything is another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from apollo_tp.checkpoint import checksum
from apollo_tp.distributed.control import Control
from apollo_tp.shards.boxes import Box

DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.float64)


def plain(values: torch.Tensor) -> int:
    """By the definition: bits, as signed integers, times two times the place and one."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return sum(bit * (2 * i + 1) for i, bit in enumerate(values.reshape(-1).view(bits).tolist())) % (1 << 64)


def boxes(shape: tuple[int, ...], parts: int) -> Iterator[Box]:
    """The tensor cut along each of its dimensions in up to so many parts."""
    cuts = [sorted({0, n, *(n * i // parts for i in range(1, parts))}) for n in shape]
    for corner in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
        yield Box(tuple(a for a, _ in corner), tuple(b - a for a, b in corner))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (4, 1, 6), (3, 200_000)])
def test_parts_add_up_to_the_whole(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (torch.randn(shape, dtype=torch.float64) * 50).to(dtype)
    expected = plain(values) if values.numel() < 1000 else None
    for parts in (1, 2, 3):
        found = checksum.add(
            {
                "x": checksum.of_box(
                    values[tuple(slice(o, o + n) for o, n in zip(b.offset, b.shape, strict=True))], b, shape
                )
            }
            for b in boxes(shape, parts)
        )["x"]
        expected = expected if expected is not None else found
        assert found == expected, parts


def test_every_damage_is_another_checksum() -> None:
    """A bit, two values that changed places, a part that is zero, one that was written a row too low."""
    values = torch.randn(20, 30).bfloat16()
    whole = Box((0, 0), (20, 30))
    right = checksum.of_box(values, whole, (20, 30))
    for damage in range(4):
        wrong = values.clone()
        if damage == 0:
            wrong.view(torch.int16)[19, 29] ^= 1
        elif damage == 1:
            wrong[3, 4], wrong[3, 5] = values[3, 5], values[3, 4]
        elif damage == 2:
            wrong[10:12] = 0
        else:
            wrong[6:16] = values[5:15]
        assert checksum.of_box(wrong, whole, (20, 30)) != right, damage


def test_what_was_saved_without_checksums_is_passed_over() -> None:
    saved = {"a": checksum.text(1), "b": checksum.text(2)}
    assert checksum.differing(saved, {"a": 1, "b": 3, "c": 4}) == ["b"]
    assert checksum.differing({}, {"a": 1}) == []


def test_sums_of_many_boxes_can_be_sent() -> None:
    """A rank's boxes of one tensor add up to more than 64 bits, which a message between ranks cannot carry."""
    control = Control(0, 1)
    own = {"a": 3 * ((1 << 64) - 1), "b": 5}
    assert checksum.over_ranks(own, control, control) == {"a": (1 << 64) - 3, "b": 5}
