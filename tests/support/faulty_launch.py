"""The launcher with faults, chosen by the first token id of a step; all but the second are on the last rank only.

They occur between its forward and its backward pass, when other ranks are inside a collective, or while it writes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist

from apollo_tp.launch.__main__ import main
from apollo_tp.model import BoundModel, LossSums
from apollo_tp.model.batch import PackedBatch
from apollo_tp.optim.update_group import UpdateGroup

FAULTY_TOKEN, ALL_OUT_OF_MEMORY, ONE_OUT_OF_MEMORY, KILLED_IN_BACKWARD, KILLED_IN_WRITE = 13, 14, 15, 16, 17
RAISES_IN_OPTIMIZER = 18
TOO_MANY_BYTES = 1 << 50
_forward_loss, _update, _gather = BoundModel.forward_loss, UpdateGroup.update, UpdateGroup._gather_scales
_token = 0


def _faulty(self: BoundModel, batch: PackedBatch) -> LossSums:
    global _token
    sums = _forward_loss(self, batch)
    _token, last = int(batch.token_ids[0]), dist.get_rank() == dist.get_world_size() - 1
    if _token == ALL_OUT_OF_MEMORY or (_token == ONE_OUT_OF_MEMORY and last):
        torch.empty(TOO_MANY_BYTES, dtype=torch.uint8, device=batch.token_ids.device)
    if _token == FAULTY_TOKEN and last:
        raise ValueError(f"injected on rank {dist.get_rank()}")
    if _token == KILLED_IN_BACKWARD and last:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums


def _killed(self: UpdateGroup, *args: Any, **kwargs: Any) -> Any:
    decision = _update(self, *args, **kwargs)
    if _token == KILLED_IN_WRITE and dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)  # on a GPU the kernels that write are queued or running by now
    return decision


def _raises(self: UpdateGroup, local: torch.Tensor) -> Any:
    """Between two sums over ranks: others wait in the one that follows."""
    if _token == RAISES_IN_OPTIMIZER and dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError(f"injected on rank {dist.get_rank()}")
    return _gather(self, local)


if __name__ == "__main__":  # not in the tests' own process, which imports names from here
    BoundModel.forward_loss = _faulty  # type: ignore[method-assign]
    UpdateGroup.update = _killed  # type: ignore[method-assign]
    UpdateGroup._gather_scales = _raises  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
