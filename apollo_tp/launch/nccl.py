"""How NCCL's process groups end a rank after an error or a timeout. Imports no torch."""

from __future__ import annotations

import logging
import os

log = logging.getLogger("apollo_tp")

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
SKIP_CLEAN_UP = "3"
"""End the process without aborting its communicators (torch's own default where a launcher sets nothing)."""


def end_without_abort() -> None:
    """Have torch's watchdog end this process after a timeout in NCCL, and not abort its communicators before. Call it
    before torch is imported.

    Ranks write memory that a server reads. An abort releases a kernel that waits for another rank, and with it all work
    that is queued after it, such as the write of an update whose sums never happened. The optimizer would detect that;
    this prevents it.
    """
    given = os.environ.get(ERROR_HANDLING)
    if given not in (None, SKIP_CLEAN_UP):
        log.info(
            "%s: got %s (torchrun sets 1), expected %s, to which it is set: if communicators were aborted before a rank "
            "ends, the work that is queued after them would run, and write to weights that are served",
            ERROR_HANDLING,
            given,
            SKIP_CLEAN_UP,
        )
    os.environ[ERROR_HANDLING] = SKIP_CLEAN_UP
