"""Processes of this machine, told apart from later ones with the same process id. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, told apart from a later one with the same pid by its start time (clock ticks since boot)."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Identity of a running process, or None. Zombies count as ended."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        """True while this very process runs (in this PID namespace)."""
        return ProcessId.of(self.pid) == self


def pid_namespace() -> str:
    """Identity of this process's PID namespace; CUDA IPC and /proc lookups work only within one."""
    return os.readlink("/proc/self/ns/pid")
