"""Make served parameters reachable from another process: cudaIpc handles, or one memfd per rank on CPU."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from apollo_tp.shards.manifest import Allocation

ALIGNMENT_BYTES = 64


def share(parameters: Sequence[Tensor], device: torch.device) -> list[tuple[int, Allocation]]:
    """Make the memory of ``parameters`` reachable; returns (base address in bytes, allocation), ascending by address. On a
    CPU the parameters are moved into a new allocation. Raises RuntimeError if CUDA memory cannot be exported."""
    return _share_cuda(parameters) if device.type == "cuda" else [_share_cpu(parameters)]


def _share_cpu(parameters: Sequence[Tensor]) -> tuple[int, Allocation]:
    """Move parameters into one memfd: it has no name, needs no space in /dev/shm, and disappears with its last process.

    The trainer opens /proc/<pid>/fd/<n>, which the kernel grants to the same user only.
    """
    offsets, total = [], 0
    for parameter in parameters:
        offsets.append(total)
        total += -(-parameter.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    fd = os.memfd_create("apollo_tp", os.MFD_CLOEXEC)
    os.ftruncate(fd, total)
    storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", True, total)
    for parameter, offset in zip(parameters, offsets, strict=True):
        shared = torch.empty(0, dtype=parameter.dtype).set_(
            storage, offset // parameter.element_size(), parameter.shape, parameter.stride()
        )
        shared.copy_(parameter.data)
        parameter.data = shared
    return storage.data_ptr(), Allocation(kind="memfd", handle=str(fd), num_bytes=total)


def _share_cuda(parameters: Sequence[Tensor]) -> list[tuple[int, Allocation]]:
    """One cudaIpc handle per allocation base; nothing moves. Raises RuntimeError if the memory cannot be exported."""
    from cuda.bindings import driver, runtime

    torch.cuda.synchronize()
    bases: dict[int, int] = {}
    for parameter in parameters:
        error, base, size = driver.cuMemGetAddressRange(parameter.data_ptr())
        _check(error, "cuMemGetAddressRange")
        bases[int(base)] = int(size)
    found = []
    for base, size in sorted(bases.items()):
        error, handle = runtime.cudaIpcGetMemHandle(base)
        _check(error, "cudaIpcGetMemHandle")
        encoded = base64.b64encode(bytes(handle.reserved)).decode()
        found.append((base, Allocation(kind="cuda_ipc", handle=encoded, num_bytes=size)))
    return found


def _check(error: object, call: str) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise RuntimeError(
            f"{call}: got {error}; expected memory from cudaMalloc. Serve without sleep mode and without "
            "expandable_segments"
        )
