"""A limit on a GPU's multiprocessors (SMs) for this process, by a CUDA green context: a set of SMs on which everything runs
that is launched into its stream.

With a server under CUDA MPS on the same GPU, only the server uses the other SMs. MPS itself can limit a client too, by
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, but cuBLAS then multiplies wrong at most shares (``product_check``, and
docs/decisions/sharing-gpus.md).
"""

from __future__ import annotations

from typing import Any

import torch

from apollo_tp.errors import DeviceError

GRANULARITY = 8
"""Compute capability 9.0 divides SMs in multiples of this; earlier devices allow smaller steps."""

_contexts: list[object] = []
"""Green contexts live as long as the process, as the streams in them do."""


def num_sms(percent: int | None, total: int) -> int:
    """SMs of a share of ``percent`` of ``total``: the nearest multiple of GRANULARITY, at least one; all for None or 100."""
    if percent is None or percent == 100 or total <= GRANULARITY:
        return total
    return min(max(1, round(total * percent / 100 / GRANULARITY)) * GRANULARITY, total)


def limit_sms(device: torch.device, percent: int | None) -> int:
    """Run what this thread launches on the CUDA ``device`` from now on on ``percent`` of its SMs; returns how many.

    Changes the thread's current stream, in which autograd also runs the backward pass of what was launched there. Streams
    made later are not limited, nor are NCCL's, which need few SMs. Waits for the device. Raises DeviceError where torch or
    the driver has no green contexts.
    """
    total = torch.cuda.get_device_properties(device).multi_processor_count
    count = num_sms(percent, total)
    if count == total:
        return total
    from torch.cuda import green_contexts

    try:
        context: Any = green_contexts.GreenContext.create(num_sms=count, device_id=device.index)
        stream = context.Stream()
    except (RuntimeError, AttributeError) as error:
        raise DeviceError(
            f"qos.sm_percent={percent}: got no green context of {count} of {total} SMs on {device} ({error}), expected one; "
            "it needs torch 2.11 or newer built for CUDA 12.8 or newer, and such a driver. Use qos.pace instead"
        ) from error
    _contexts.append(context)
    torch.cuda.synchronize(device)
    torch.cuda.set_stream(stream)
    return count
