"""torchrun, whose ranks are forked from its agent. The arguments are torchrun's; its command for a rank is ``-m MODULE``.

Ranks share their hash seed, which those of the real torchrun do not.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from typing import IO, Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import apollo_tp.launch.session  # noqa: F401 - for the ranks
from tests.support.forks import Fork, become, status_of_child

PR_SET_NAME = 15


def _fork_rank(args: Any, env: dict[str, str], stdout: IO[str] | None, stderr: IO[str] | None, **_: Any) -> Fork:
    """In place of ``subprocess.Popen``."""
    if (pid := os.fork()) == 0:
        ctypes.CDLL(None).prctl(PR_SET_NAME, f"rank {env['RANK']}".encode())
        atexit._clear()  # what the agent has registered is its own business
        outputs = [file.fileno() if file else number for number, file in ((1, stdout), (2, stderr))]
        become(args[args.index("-m") + 1 :], env, outputs)
    return Fork(pid, status_of_child)


if __name__ == "__main__":
    subprocess_handler.Popen = _fork_rank  # type: ignore[misc, assignment]
    run.main(sys.argv[1:])
