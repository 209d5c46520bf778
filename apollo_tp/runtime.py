"""The private folder through which a server and its trainer find each other, and who is alive. No torch.

    <base>/                       0700, owned by this user
      claims.lock                 held (flock) by a server while it claims its instance id
      <instance id>/              one per vLLM server
        rank0.json, rank1.json    manifests, written under a temporary name and renamed
        serving.json              written by the API server once the engine is up
        apollo_tp_server.lock     held (flock) by the server's first process, and those forked from it
        trainer.lock              held (flock) by the one trainer of this server
        ranks.sock, coordinator.sock

The base is $APOLLO_TP_RUNTIME_DIR, else $XDG_RUNTIME_DIR/apollo_tp, else /tmp/apollo_tp-<uid>.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apollo_tp.errors import ApolloTpError, ConfigError, TrainerBusyError

INSTANCE_VARIABLE = "APOLLO_TP_INSTANCE"
RUNTIME_DIR_VARIABLE = "APOLLO_TP_RUNTIME_DIR"
# sockaddr_un.sun_path holds 108 bytes with its terminating zero
MAX_SOCKET_PATH_BYTES = 107


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


def private_dir(path: Path) -> Path:
    """Create ``path`` as 0700 if missing, and return it. Raises ConfigError if others own it or can read it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"runtime folder {path}: got owner {info.st_uid} and mode {stat.filemode(info.st_mode)}, expected a folder "
            f"of user {os.getuid()} that nobody else can read; chmod 700 it, or set ${RUNTIME_DIR_VARIABLE} to another"
        )
    return path


def base_dir(explicit: str | None = None) -> Path:
    """The base folder (see the module docstring), created if missing."""
    if explicit or os.environ.get(RUNTIME_DIR_VARIABLE):
        return private_dir(Path(explicit or os.environ[RUNTIME_DIR_VARIABLE]))
    if os.environ.get("XDG_RUNTIME_DIR"):
        return private_dir(Path(os.environ["XDG_RUNTIME_DIR"]) / "apollo_tp")
    return private_dir(Path(tempfile.gettempdir()) / f"apollo_tp-{os.getuid()}")


def instance_dir(instance_id: str, base: Path | None = None) -> Path:
    """Folder of one server, created if missing. Raises ConfigError if the id is not a plain name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", instance_id):
        raise ConfigError(f"instance id: got {instance_id!r}, expected up to 64 letters, digits, '_', '-', '.'")
    return private_dir((base or base_dir()) / instance_id)


def ensure_instance_id() -> str:
    """This server's instance id, the same in all processes of one vLLM process tree (children inherit it)."""
    return os.environ.setdefault(INSTANCE_VARIABLE, f"vllm-{uuid.uuid4().hex[:8]}")


def socket_path(folder: Path, name: str) -> Path:
    """Path of a unix socket. Raises ConfigError if the system could not bind it."""
    path = folder / name
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"socket path {path}: got {len(os.fsencode(path))} bytes, expected at most {MAX_SOCKET_PATH_BYTES}; "
            f"set ${RUNTIME_DIR_VARIABLE} to a shorter folder"
        )
    return path


def write_private(path: Path, content: bytes) -> None:
    """Write a 0600 file that appears complete or not at all. Not for what must survive the machine: it waits for no disk,
    since what these files speak of dies with the server."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, refuse: Callable[[str], ApolloTpError], wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the file ``path`` (flock: free again once this process has ended, however it did, and not handed on to programs
    that it starts). Raises ``refuse(the holder's pid)`` if another has it for longer than ``wait_seconds``."""
    deadline = time.monotonic() + wait_seconds
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise refuse(os.pread(fd, 32, 0).decode() or "?") from None
            time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


@contextmanager
def trainer_lock(folder: Path) -> Iterator[None]:
    """Hold the one trainer's place at a server. Raises TrainerBusyError if another process has it."""

    def refuse(holder: str) -> ApolloTpError:
        return TrainerBusyError(
            f"server {folder.name}: got a second trainer, expected one; process {holder} trains it already. "
            "Stop that one, or name another server with server.instance=..."
        )

    with locked(folder / "trainer.lock", refuse):
        yield


def remove_instance(folder: Path) -> None:
    """Remove the folder of a server that ended."""
    shutil.rmtree(folder, ignore_errors=True)
