"""On a trainer rank: map the memory that the vLLM rank of the same number exported, as views by checkpoint tensor name.

No data moves. ``MappedRank.close`` drops the views before it closes the mappings.
"""

from __future__ import annotations

import base64
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apollo_tp.errors import MappingError, ServerGoneError
from apollo_tp.shards.boxes import Shard
from apollo_tp.shards.manifest import Allocation, Manifest
from apollo_tp.shards.placement import Placement, place, second_copies

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's dtypes by the names that safetensors files, and so the checkpoint records of a manifest, use."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The inverse of DTYPES."""


@dataclass
class MappedRank:
    """The served memory of one rank.

    ``tensors``: by checkpoint name, the shard and a local view of served memory of ``shard.local_shape``, in the served
    dtype. ``served``: the local served tensors by their names in vLLM. ``fused_tensors`` lists the checkpoint names
    that share a served tensor (query, key and value rows), where there are several. ``copies``: the names of further
    checkpoint tensors, each with the name of the tensor whose values it has.
    """

    manifest: Manifest
    device: torch.device
    tensors: dict[str, tuple[Shard, Tensor]]
    served: dict[str, Tensor]
    fused_tensors: list[list[str]] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    _opened: list[Any] = field(default_factory=list, repr=False)

    @property
    def stored(self) -> dict[str, tuple[Shard, Tensor]]:
        """The tensors of a checkpoint: ``tensors``, and their second copies under their own names."""
        return self.tensors | {copy: self.tensors[original] for copy, original in self.copies.items()}

    def close(self) -> None:
        """Drop the views, then the mappings. Callers must have dropped theirs."""
        self.tensors.clear()
        self.served.clear()
        for close in self._opened:
            close()
        self._opened.clear()


def map_rank(manifests: Sequence[Manifest], rank: int) -> MappedRank:
    """Map rank ``rank`` of the server that published ``manifests`` (already checked to agree).

    Raises UnsupportedModelError if not all that is served can be trained, ServerGoneError if the server ended meanwhile,
    MappingError if its memory cannot be opened here.
    """
    placements = place(manifests)[rank]
    manifest = manifests[rank]
    device = _local_device(manifest)
    mapped = MappedRank(manifest, device, {}, {}, copies=second_copies(manifests))
    bases = []
    for allocation in manifest.allocations:
        base, close = _open(allocation, manifest, device)
        bases.append(base)
        mapped._opened.append(close)
    for served in manifest.served:
        dtype = getattr(torch, served.dtype)
        base = bases[served.allocation]
        end = served.offset_bytes + _extent(served.shape, served.stride) * dtype.itemsize
        if end > base.nbytes:
            raise MappingError(f"rank {rank}, {served.name}: ends at byte {end} of an allocation of {base.nbytes}")
        flat = torch.empty(0, dtype=dtype, device=device).set_(base.untyped_storage())
        mapped.served[served.name] = flat.as_strided(
            served.shape, served.stride, base.storage_offset() // dtype.itemsize + served.offset_bytes // dtype.itemsize
        )
    for name, placement in placements.items():
        mapped.tensors[name] = (placement.shard, _view(placement, mapped))
    members: dict[str, list[str]] = defaultdict(list)
    for name, placement in placements.items():
        members[placement.served].append(name)
    mapped.fused_tensors = [names for served, names in members.items() if served and len(names) > 1]
    return mapped


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included; 0 if it has none."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _view(placement: Placement, mapped: MappedRank) -> Tensor:
    """The local view of served memory that ``placement`` describes; an empty tensor if the rank holds nothing."""
    shape = placement.shard.local_shape
    if not placement.served:
        return torch.empty(shape, dtype=getattr(torch, placement.dtype), device=mapped.device)
    served = mapped.served[placement.served]
    # A dimension of size one has no stride of its own (0); give it the one of a contiguous tensor.
    stride = list(placement.stride)
    for d in reversed(range(len(shape))):
        if stride[d] == 0:
            stride[d] = stride[d + 1] * shape[d + 1] if d + 1 < len(shape) else 1
    return served.as_strided(shape, stride, served.storage_offset() + placement.offset)


def visible_uuids() -> list[str]:
    """The UUIDs of the GPUs that this process sees, in lower case, by their index."""
    return [str(torch.cuda.get_device_properties(i).uuid).lower() for i in range(torch.cuda.device_count())]


def _local_device(manifest: Manifest) -> torch.device:
    """The CUDA device with the exporter's UUID; indices differ under another CUDA_VISIBLE_DEVICES."""
    if manifest.device == "cpu":
        return torch.device("cpu")
    wanted = manifest.device_uuid.lower().removeprefix("gpu-")
    seen = visible_uuids()
    for index, uuid in enumerate(seen):
        if uuid.removeprefix("gpu-") == wanted:
            return torch.device("cuda", index)
    raise MappingError(
        f"rank {manifest.tp_rank}: got GPUs {seen}, expected the server's {wanted}; "
        "start the trainer with a CUDA_VISIBLE_DEVICES that contains the server's GPUs"
    )


def _open(allocation: Allocation, manifest: Manifest, device: torch.device) -> tuple[Tensor, Any]:
    """A uint8 tensor [num_bytes] over an allocation of the server, and the function that closes the mapping.

    Raises MappingError or ServerGoneError.
    """
    if allocation.kind == "cuda_ipc":
        return _open_cuda(allocation, manifest, device)
    path = f"/proc/{manifest.pid}/fd/{allocation.handle}"
    try:
        if os.stat(path).st_size < allocation.num_bytes:
            raise MappingError(f"{path}: got {os.stat(path).st_size} bytes, expected {allocation.num_bytes}")
        storage = torch.UntypedStorage.from_file(path, True, allocation.num_bytes)
    except FileNotFoundError:
        raise ServerGoneError(f"rank {manifest.tp_rank}: process {manifest.pid} of the server ended") from None
    except PermissionError as error:
        raise MappingError(
            f"rank {manifest.tp_rank}: {error}; expected a server of the same user. Start both as one user"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage), lambda: None


class _DevicePointer:
    """Device memory as ``__cuda_array_interface__``, so that torch wraps it without a copy."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def _open_cuda(allocation: Allocation, manifest: Manifest, device: torch.device) -> tuple[Tensor, Any]:
    """``_open`` through CUDA IPC. Makes ``device`` the current one."""
    from cuda.bindings import runtime

    torch.cuda.set_device(device)
    torch.cuda.init()
    torch.empty(0, device=device)
    handle = runtime.cudaIpcMemHandle_t()
    handle.reserved = base64.b64decode(allocation.handle)
    error, pointer = runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
    if int(error) != 0:
        alive = "runs" if manifest.process.alive() else "has ended"
        raise MappingError(
            f"rank {manifest.tp_rank}: cudaIpcOpenMemHandle gave {error}; the server's process {manifest.pid} {alive}. "
            "Expected a live server in the same PID namespace and container; start the trainer there"
        )
    holder = _DevicePointer(int(pointer), allocation.num_bytes)
    tensor = torch.as_tensor(holder, device=device)
    if tensor.data_ptr() != int(pointer):
        raise MappingError(f"rank {manifest.tp_rank}: torch copied the mapped memory instead of wrapping it")

    def close() -> None:
        torch.cuda.synchronize(device)
        runtime.cudaIpcCloseMemHandle(pointer)

    return tensor, close


def verify_against_checkpoint(mapped: MappedRank, num_tensors: int, seed: int = 0) -> int:
    """Compare mapped tensors with the checkpoint on disk, bit for bit; returns how many were compared.

    ``num_tensors`` < 0 compares all. A checkpoint without files (dummy weights) compares none. Raises MappingError listing
    every tensor that differs.
    """
    from safetensors import safe_open

    files = {t.name: t.file for t in mapped.manifest.checkpoint if t.file}
    names = [name for name in mapped.tensors if name in files]
    if 0 <= num_tensors < len(names):
        names = sorted(random.Random(seed).sample(names, num_tensors))
    different = []
    for name in names:
        shard, local = mapped.tensors[name]
        with safe_open(Path(mapped.manifest.model_path) / files[name], framework="pt") as file:
            part = file.get_slice(name)
            for box, start in shard.boxes:
                index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                on_disk = (part[index] if index else file.get_tensor(name)).to(local.dtype)
                mine = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
                if not torch.equal(_bits(mine.cpu()), _bits(on_disk)):
                    different.append(f"{name} {list(box.offset)}+{list(box.shape)}")
    if different:
        raise MappingError(
            f"rank {mapped.manifest.tp_rank}: got other values than {mapped.manifest.model_path} in {different}, expected "
            "them bit for bit; the server transforms these tensors, or the folder changed since it was loaded"
        )
    return len(names)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaNs compare equal and -0.0 differs from 0.0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
