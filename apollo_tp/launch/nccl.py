"""How NCCL's process groups end a rank after an error or a timeout. No torch before."""

from __future__ import annotations

import logging
import os

log = logging.getLogger("apollo_tp")

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
SKIP_CLEAN_UP = "3"
"""End the process and leave its communicators alone (torch's own default where a launcher sets nothing)."""


def end_without_abort() -> None:
    """Have torch's watchdog end this process after a timeout in NCCL, and not abort its communicators before. Call it
    before torch is imported.

    Ranks write memory that a server reads. An abort lets a kernel that waits for another rank go, and with it all work
    that is queued behind: the write of an update whose sums never happened. The optimizer would find that out, but need
    not.
    """
    given = os.environ.get(ERROR_HANDLING)
    if given not in (None, SKIP_CLEAN_UP):
        log.info(
            "%s: got %s (torchrun sets 1), expected %s, to which it is set: if communicators were aborted before a rank "
            "ends, the work that waits behind them would run on, into weights that are served",
            ERROR_HANDLING,
            given,
            SKIP_CLEAN_UP,
        )
    os.environ[ERROR_HANDLING] = SKIP_CLEAN_UP
