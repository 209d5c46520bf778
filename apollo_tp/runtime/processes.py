"""Identity of processes on this machine, which a later process with the same process id does not share. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, identified by its pid and its start time (clock ticks since boot): pids are used again."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of the running process ``pid``; None if there is none. Zombies count as ended."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        """Whether this process still runs (in this PID namespace)."""
        return ProcessId.of(self.pid) == self


def pid_namespace() -> str:
    """The identity of this process's PID namespace. CUDA IPC and look-ups in /proc work only within one namespace."""
    return os.readlink("/proc/self/ns/pid")
