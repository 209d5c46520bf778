"""Make served parameters reachable from another process: cudaIpc handles, or one memfd per rank on CPU."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apollo_tp.shards.manifest import Allocation
from apollo_tp.vllm_plugin.views import owners

ALIGNMENT_BYTES = 64


def share(
    parameters: Sequence[Tensor], held: Iterable[Tensor] = (), *, device: torch.device
) -> list[tuple[int, Allocation]]:
    """Make the memory of ``parameters`` reachable; returns (base address in bytes, allocation), ascending by address. On a
    CPU the parameters are moved into a new allocation, and tensors of ``held`` that are views of them stay so. Raises
    RuntimeError if CUDA memory cannot be exported."""
    return _share_cuda(parameters) if device.type == "cuda" else [_share_cpu(parameters, held)]


def _share_cpu(parameters: Sequence[Tensor], held: Iterable[Tensor]) -> tuple[int, Allocation]:
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

    def at(offset: int, like: Tensor) -> Tensor:
        place = offset // like.element_size()
        return torch.empty(0, dtype=like.dtype).set_(storage, place, like.shape, like.stride())

    views = [(view, i, view.data_ptr() - parameters[i].data_ptr()) for view, i in owners(held, parameters)]
    for parameter, offset in zip(parameters, offsets, strict=True):
        shared = at(offset, parameter)
        shared.copy_(parameter.data)
        parameter.data = shared
    for view, i, distance in views:
        view.data = at(offsets[i] + distance, view)
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
