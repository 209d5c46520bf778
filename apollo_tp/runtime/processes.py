"""Identity of processes on this machine, which a later process with the same process id does not share. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, identified by its pid and its start time (clock ticks since boot): pids are used again."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of the running process ``pid``; None if there is none. Zombies count as ended."""
        fields = _stat(pid)
        return None if not fields or fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        """Whether this process still runs (in this PID namespace)."""
        return ProcessId.of(self.pid) == self


def ancestors(pid: int, last: int) -> list[ProcessId]:
    """The processes above ``pid``, from its parent up to ``last``; empty if ``last`` is not one of them."""
    found: list[ProcessId] = []
    while (fields := _stat(pid)) and (pid := int(fields[1])) > 0 and (above := ProcessId.of(pid)):
        found.append(above)
        if pid == last:
            return found
    return []


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third one on: state, parent, ...; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def pid_namespace() -> str:
    """The identity of this process's PID namespace. CUDA IPC and look-ups in /proc work only within one namespace."""
    return os.readlink("/proc/self/ns/pid")


def boot_id() -> str:
    """The identity of this host, since its last start."""
    return BOOT_ID.read_text().strip()


def machine() -> str:
    """What processes have in common that can map each other's memory: one host, one PID namespace."""
    return f"{boot_id()} {pid_namespace()}"
