"""Checksums of global tensors that each rank can add its part to: the sum of bits, each weighted by its global place.

The sum over the boxes of a tensor is the checksum of the tensor, however it is cut. It finds damage (bits that flipped,
parts that are missing or in the wrong place), not what somebody forged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from apollo_tp.distributed.control import ComputeControl
from apollo_tp.shards.boxes import Box

_MODULUS = 1 << 64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}
"""On a CPU, what its cache holds once it is widened."""
_EXACT = 1 << 52
"""Integers below this, and sums of them, are exact in fp64."""


def of_box(values: Tensor, box: Box, global_shape: Sequence[int]) -> int:
    """The part that ``box`` has in the checksum of a tensor of ``global_shape``. ``values`` are of the box's shape, on any
    device, which is waited for."""
    if not box.numel:
        return 0
    shape, extents, offset = (box.shape, global_shape, box.offset) if box.shape else ((1,), (1,), (0,))
    device = values.device
    bits = values.detach().contiguous().view(_BITS[values.element_size()]).view(-1, shape[-1])
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for count, extent, start in zip(shape[:-1], extents[:-1], offset[:-1], strict=True):
        rows = (rows[:, None] * extent + torch.arange(start, start + count, device=device)).flatten()
    # element i of the flat tensor has the weight 2 i + 1; sums and products of int64 wrap around, as they should
    columns = 2 * torch.arange(offset[-1], offset[-1] + shape[-1], device=device) + 1
    weights = torch.stack([columns, torch.ones_like(columns)], 1).double()
    largest = (1 << 8 * bits.element_size() - 1) * (2 * extents[-1] + 1) * shape[-1]
    total = torch.zeros((), dtype=torch.int64, device=device)
    chunk = max(1, _CHUNK_ELEMENTS[device.type] // shape[-1])
    for part, numbers in zip(bits.split(chunk), rows.split(chunk), strict=True):
        if largest < _EXACT:  # a product of matrices is much faster, and exact
            by_row = (part.double() @ weights).long()
        else:
            wide = part.long()
            by_row = torch.stack([(wide * columns).sum(1), wide.sum(1)], 1)
        total += by_row[:, 0].sum() + (by_row[:, 1] * (2 * extents[-1] * numbers)).sum()
    return int(total.item()) % _MODULUS


def add(sums: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum by name."""
    total: dict[str, int] = {}
    for each in sums:
        for name, value in each.items():
            total[name] = (total.get(name, 0) + value) % _MODULUS
    return total


def over_ranks(own: Mapping[str, int], *controls: ComputeControl) -> dict[str, int]:
    """The sum by name over the ranks of each of ``controls`` in turn. Collective: a gather for each."""
    total = add([own])  # one tensor may have several boxes here, whose sum is above what a message can carry
    for control in controls:
        rows = control.gather(msgspec.msgpack.encode(total))
        total = add(msgspec.msgpack.decode(row, type=dict[str, int]) for row in rows)
    return total


def differing(saved: Mapping[str, str], found: Mapping[str, int]) -> list[str]:
    """The names whose checksum is not the saved one; those that were saved without one are passed over."""
    return [name for name, value in found.items() if name in saved and saved[name] != text(value)]


def text(value: int) -> str:
    """A checksum as it is written: 16 hexadecimal digits."""
    return f"{value:016x}"
