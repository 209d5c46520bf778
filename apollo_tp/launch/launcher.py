"""What torchrun or mpirun told this process: its rank, and where to report why it failed. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Literal

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class Launched:
    """Who started this process, as rank ``rank`` of ``size``."""

    by: Literal["torchrun", "mpi", "nobody"]
    rank: int = 0
    size: int = 1


def launched() -> Launched:
    """Read the launcher's variables.

    torchrun's own win over those of MPI, which each process has in a shell that srun or mpirun started, and in pods. Then
    come those of an MPI job of several processes, then RANK and WORLD_SIZE as set by hand or by a pod's operator.
    """
    environment = os.environ
    by_torchrun = Launched("torchrun", int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))
    if "TORCHELASTIC_RUN_ID" in environment:
        return by_torchrun
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if int(environment.get(size, 1)) > 1:
            return Launched("mpi", int(environment.get(rank, 0)), int(environment[size]))
    return (
        by_torchrun
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
        else Launched("nobody")
    )


def record_failure(message: str, traceback: str = "") -> None:
    """Write why this rank failed where torchrun looks for it, in the form of ``torch.distributed.elastic``'s ``record``:
    torchrun then ends its report with it. ``traceback`` is for errors that nobody foresaw; it replaces the message there."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path:
        return
    extra = {"timestamp": str(int(time.time()))} | ({"py_callstack": traceback} if traceback else {})
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
