"""The record that rank r of a vLLM server publishes: its tensors, their memory, and their relation to the checkpoint.

JSON, one file per rank, with a schema version; no torch, no pickle. Plugin and trainer share only this module and ``boxes``.
All shapes, strides and offsets are in elements unless the name says bytes. A rank whose export failed publishes a
manifest with ``error`` set, so that the trainer can report the reason instead of waiting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from apollo_tp.errors import DECODE_ERRORS, ManifestError
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
    """A parameter of vLLM's model on this rank (local shape); ``aliases`` are its further names (tied weights)."""

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
    """A box of a checkpoint tensor (global coordinates), and the view of a served tensor that contains its values.

    ``view_offset`` counts elements from the start of the served tensor; ``view_stride`` has the dimensions of the checkpoint
    tensor, in their order.
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


class ServerProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process without which the server answers nobody: its API server, or the engine between that and the workers."""

    role: str
    pid: int
    start_ticks: int

    @property
    def identity(self) -> processes.ProcessId:
        return processes.ProcessId(self.pid, self.start_ticks)

    def __str__(self) -> str:
        return f"{self.role} (process {self.pid})"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a trainer needs to know about one rank of a server."""

    schema_version: int
    instance_id: str
    created_at: float
    vllm_version: str
    model_path: str
    endpoints: bool = False
    """Whether an API server will publish ``serving.json`` once the engine is up. A vllm.LLM has none."""
    served_model_names: list[str]
    dtype: str
    tp_rank: int
    tp_size: int
    num_nodes: int = 1
    """Hosts (``--nnodes``) over which the server's ranks are spread: as many on each, in the order of ranks."""
    host: str
    boot_id: str = ""
    pid: int
    pid_start_ticks: int
    pid_namespace: str
    parents: list[ServerProcess] = []
    """The processes above this one, up to the server's first."""
    device: Literal["cpu", "cuda"]
    device_uuid: str = ""
    max_model_len: int = 0
    config_overrides: dict[str, Any] = {}
    """Fields of the model's config that server options override, or of which vLLM makes something else (a window), with the
    values that the server uses."""
    trace_seconds: float = 0.0
    publish_seconds: float = 0.0
    allocations: list[Allocation] = []
    served: list[ServedTensor] = []
    checkpoint: list[CheckpointTensor] = []
    segments: list[SegmentRecord] = []
    not_served: list[str] = []
    """Checkpoint tensors that the server's loader skips (vision towers, MTP heads). They are copied into new checkpoints."""
    copies: dict[str, str] = {}
    """For each tensor of ``not_served`` that is a second copy of a served tensor, the name of the latter, whose values
    are written for both into checkpoints. Only rank 0 publishes them, since it has to read the files to find them."""
    refusals: list[Refusal] = []
    error: str = ""

    @property
    def life(self) -> str:
        """Identifies one run of the server: a later one may have the same ``instance_id``, but other weights."""
        return f"{self.instance_id}@{self.pid}.{self.pid_start_ticks}"

    @property
    def process(self) -> processes.ProcessId:
        return processes.ProcessId(self.pid, self.pid_start_ticks)

    @property
    def is_ours(self) -> bool:
        """Whether it was published on this host, in this PID namespace."""
        return self.pid_namespace == processes.pid_namespace() and self.boot_id in ("", processes.boot_id())

    @property
    def ranks_here(self) -> range:
        """The server's ranks on the host of this one."""
        count = self.tp_size // self.num_nodes
        first = self.tp_rank // count * count
        return range(first, first + count)

    @property
    def server_processes(self) -> list[ServerProcess]:
        """The worker that published this, and the processes above it."""
        worker = ServerProcess(role=f"rank {self.tp_rank}", pid=self.pid, start_ticks=self.pid_start_ticks)
        return [worker, *self.parents]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


def publish(manifest: Manifest, folder: Path) -> Path:
    """Write ``rank<r>.json`` (0600) into ``folder``; it appears complete or not at all. Returns its path."""
    path = folder / f"rank{manifest.tp_rank}.json"
    private_files.write_private(path, _encoder.encode(manifest))
    return path


def read(path: Path) -> Manifest:
    """Read one manifest. Raises ManifestError if it has another schema version or cannot be decoded."""
    content = path.read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{path}: got schema version {version}, expected {SCHEMA_VERSION}; "
                "use the same apollo_tp release for the server and the trainer"
            )
        return _decoder.decode(content)
    except DECODE_ERRORS as error:
        raise ManifestError(
            f"{path}: got an unreadable manifest ({error}), expected JSON; restart the server"
        ) from None


class _Versioned(msgspec.Struct):
    schema_version: int
