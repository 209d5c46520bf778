"""Private folders and files, and locks on them. No torch."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_tp.errors import ApolloTpError, ConfigError

RUNTIME_DIR_VARIABLE = "APOLLO_TP_RUNTIME_DIR"


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
