"""One of two processes that meet in the barrier of sums through peer memory: ``RANK FOLDER MEETINGS``.

The memory is files that both map. Run with TRITON_INTERPRET=1. Prints, after each barrier, what the other rank wrote before
it. With 0 meetings the other rank never comes: a thread aborts the barrier, and what that leaves is read by a kernel."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

from apollo_tp.distributed.peer_kernels import barrier, read


def main(rank: int, folder: Path, meetings: int) -> None:
    mine, theirs = (
        torch.from_file(str(folder / f"rank-{r}"), shared=True, size=8, dtype=torch.int32) for r in (rank, 1 - rank)
    )
    aborted, intact = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    if meetings == 0:
        threading.Timer(1.0, lambda: aborted.fill_(1)).start()
        started = time.monotonic()
        barrier(mine[:1], theirs[:1], aborted, intact)
        told = read(intact, intact.device).item()
        print(f"{intact.item():g} {time.monotonic() - started < 30} {told:g}")
        return
    for number in range(1, meetings + 1):
        if number % 3 == rank:
            time.sleep(0.02)  # now one is late, now the other
        mine[4 + number % 2] = number  # two places in turns, as the halves of the buffers
        barrier(mine[:1], theirs[:1], aborted, intact)
        print(int(theirs[4 + number % 2]), end=" ")
    print(f"{intact.item():g}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
