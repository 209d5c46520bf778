"""The record that rank r of a vLLM server publishes: what it holds, where, and how it relates to the checkpoint.

JSON, one file per rank, schema-versioned; no torch, no pickle. Exporter and mapper share only this file and ``layout``.
All shapes, strides and offsets are in elements unless the name says bytes. A rank whose export failed publishes a
manifest with ``error`` set, so that the trainer can say why instead of waiting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from apollo_tp.errors import ManifestError
from apollo_tp.runtime import private_files, processes

SCHEMA_VERSION = 2


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """A block of memory that another process of this user can map.

    ``handle``: for cuda_ipc the 64 bytes of cudaIpcMemHandle_t in base64, for memfd the file descriptor's number in the
    exporting process.
    """

    kind: Literal["cuda_ipc", "memfd"]
    handle: str
    num_bytes: int


class ServedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter as vLLM holds it on this rank (local shape); ``aliases`` are its further names (tied weights)."""

    name: str
    allocation: int
    offset_bytes: int
    shape: list[int]
    stride: list[int]
    dtype: str
    aliases: list[str] = []


class CheckpointTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of the Hugging Face folder (global shape); ``file`` is empty if the server was started without one."""

    name: str
    shape: list[int]
    dtype: str
    file: str = ""


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a checkpoint tensor, and the view of a served tensor that holds it.

    ``view_offset`` counts elements from the start of the served tensor; view dimensions are in checkpoint order.
    """

    checkpoint: str
    box_offset: list[int]
    box_shape: list[int]
    served: str
    view_offset: int
    view_stride: list[int]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that cannot be trained in place, and why."""

    name: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that a trainer needs to know about one rank of a server."""

    schema_version: int
    instance_id: str
    created_at: float
    vllm_version: str
    model_path: str
    endpoints: bool = False
    """Whether an API server publishes ``serving.json`` once the engine is up; nobody says that for a vllm.LLM."""
    served_model_names: list[str]
    dtype: str
    tp_rank: int
    tp_size: int
    host: str
    pid: int
    pid_start_ticks: int
    pid_namespace: str
    device: Literal["cpu", "cuda"]
    device_uuid: str = ""
    max_model_len: int = 0
    config_overrides: dict[str, Any] = {}
    """Fields of the model's config that the server was told to see otherwise, with their values there."""
    trace_seconds: float = 0.0
    publish_seconds: float = 0.0
    allocations: list[Allocation] = []
    served: list[ServedTensor] = []
    checkpoint: list[CheckpointTensor] = []
    segments: list[SegmentRecord] = []
    not_served: list[str] = []
    """Checkpoint tensors that the server's loader passes over (vision towers, MTP heads): carried into checkpoints."""
    copies: dict[str, str] = {}
    """Those of ``not_served`` that are second copies of a served tensor, and its name: checkpoints get its values for them.
    On rank 0, since it takes reading the files."""
    refusals: list[Refusal] = []
    error: str = ""

    @property
    def process(self) -> processes.ProcessId:
        return processes.ProcessId(self.pid, self.pid_start_ticks)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


def publish(manifest: Manifest, folder: Path) -> Path:
    """Write ``rank<r>.json`` (0600), complete or not at all."""
    path = folder / f"rank{manifest.tp_rank}.json"
    private_files.write_private(path, _encoder.encode(manifest))
    return path


def read(path: Path) -> Manifest:
    """Decode one manifest. Raises ManifestError on anything but this schema version."""
    content = path.read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{path}: got schema version {version}, expected {SCHEMA_VERSION}; "
                "use the same apollo_tp release for the server and the trainer"
            )
        return _decoder.decode(content)
    except msgspec.DecodeError as error:
        raise ManifestError(
            f"{path}: got an unreadable manifest ({error}), expected JSON; restart the server"
        ) from None


class _Versioned(msgspec.Struct):
    schema_version: int
