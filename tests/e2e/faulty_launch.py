"""The launcher with one fault: rank 1 raises in the middle of a step whose first token id is 13.

The fault is injected between the forward and the backward pass of rank 1, so that rank 0 is inside a collective by then.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from apollo_tp.data import PackedBatch
from apollo_tp.launch.__main__ import main
from apollo_tp.model import BoundModel, LossSums

FAULTY_TOKEN = 13
_forward_loss = BoundModel.forward_loss


def _faulty(self: BoundModel, batch: PackedBatch) -> LossSums:
    sums = _forward_loss(self, batch)
    if int(batch.token_ids[0]) == FAULTY_TOKEN and dist.get_rank() == 1:
        raise ValueError("injected on rank 1")
    return sums


if __name__ == "__main__":  # not in the tests' own process, which imports a name from here
    BoundModel.forward_loss = _faulty  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
