"""Mapped memory: views by checkpoint name over real shared memory, and served tensors that do not fit into it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from apollo_tp.errors import MappingError
from apollo_tp.runtime import processes
from apollo_tp.shards.manifest import (
    SCHEMA_VERSION,
    Allocation,
    CheckpointTensor,
    Manifest,
    SegmentRecord,
    ServedTensor,
)
from apollo_tp.shards.mapping import map_rank

COLUMNS, OFFSET_BYTES = 4, 16


def _segment(name: str, rows: int, first_row: int) -> SegmentRecord:
    return SegmentRecord(
        checkpoint=name, served="gate_up", box_offset=[0, 0], box_shape=[rows, COLUMNS],
        view_offset=first_row * COLUMNS, view_stride=[COLUMNS, 1],
    )  # fmt: skip


@pytest.fixture
def manifest() -> Iterator[Manifest]:
    """One served tensor [5, COLUMNS] of two checkpoint tensors, up to the last byte of this process's shared memory."""
    process = processes.ProcessId.of(os.getpid())
    assert process is not None
    num_bytes = OFFSET_BYTES + 5 * COLUMNS * 4
    descriptor = os.memfd_create("served")
    os.ftruncate(descriptor, num_bytes)
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "instance_id": "test", "created_at": time.time(), "vllm_version": "0.32.0",
        "model_path": "/m", "served_model_names": ["m"], "dtype": "float32", "tp_rank": 0, "tp_size": 1,
        "host": "h", "pid": process.pid, "pid_start_ticks": process.start_ticks,
        "pid_namespace": processes.pid_namespace(), "device": "cpu",
    }  # fmt: skip
    yield Manifest(
        **fields,
        allocations=[Allocation(kind="memfd", handle=str(descriptor), num_bytes=num_bytes)],
        served=[
            ServedTensor(
                name="gate_up", allocation=0, offset_bytes=OFFSET_BYTES, shape=[5, COLUMNS], stride=[COLUMNS, 1],
                dtype="float32",
            )
        ],
        checkpoint=[
            CheckpointTensor(name=name, shape=[rows, COLUMNS], dtype="F32") for name, rows in (("gate", 2), ("up", 3))
        ],
        segments=[_segment("gate", 2, 0), _segment("up", 3, 2)],
    )  # fmt: skip
    os.close(descriptor)


def test_a_served_tensor_may_end_with_its_allocation(manifest: Manifest) -> None:
    """Views are the server's memory, to its last byte; tensors that share a served one are listed together."""
    mapped = map_rank([manifest], 0)
    assert mapped.fused_tensors == [["gate", "up"]]
    for name, value in (("gate", 1.0), ("up", 2.0)):
        mapped.tensors[name][1].fill_(value)
    again = map_rank([manifest], 0)
    assert again.served["gate_up"].tolist() == [[1.0] * COLUMNS] * 2 + [[2.0] * COLUMNS] * 3
    assert os.pread(int(manifest.allocations[0].handle), OFFSET_BYTES, 0) == bytes(OFFSET_BYTES), "what lies before it"
    mapped.close()
    assert mapped.tensors == mapped.served == {}


def test_a_served_tensor_beyond_its_allocation_is_refused(manifest: Manifest) -> None:
    """By one element: writing to it would write to memory that is not the server's."""
    (served,) = manifest.served
    moved = msgspec.structs.replace(served, offset_bytes=OFFSET_BYTES + 4)
    with pytest.raises(MappingError, match=r"rank 0, gate_up: ends at byte 100 of an allocation of 96"):
        map_rank([msgspec.structs.replace(manifest, served=[moved])], 0)
