"""Private folders and files, and locks on them. No torch."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_tp.errors import ApolloTpError
from apollo_tp.runtime import owned_folder

RUNTIME_DIR_VARIABLE = "APOLLO_TP_RUNTIME_DIR"
SERVER_LOCK = "apollo_tp_server.lock"
INSTANCE_FILES = re.compile(
    r"(?:rank[0-9]+|serving|served_tokenizer|weights|coordinator|coordinator_tcp|coordinator_settings|capture)\.json|(?:apollo_tp_server|trainer)\.lock"
    r"|(?:ranks|coordinator|sync)\.sock|\.[a-z0-9_]+\.json\.[a-z0-9_]{8}"
)
"""Names of all files in a server's folder. The last alternative matches files that were incomplete when their writer was
killed."""


def private_dir(path: Path) -> Path:
    """Create ``path`` as 0700 if missing, and return it. Raises ConfigError as ``owned_folder.private_folder``."""
    return owned_folder.private_folder(path, f"runtime folder (${RUNTIME_DIR_VARIABLE})")


def write_private(path: Path, content: bytes) -> None:
    """Write a 0600 file that appears complete or not at all. It is not flushed to disk, since its content is of no use
    after the server has ended: do not use this for data that must survive a crash of the machine."""
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
    """Lock the file ``path`` (flock) within the context. The lock ends with this process, however it ends, and is not
    inherited by programs that it starts. Raises ``refuse(pid of the process that has it)`` after ``wait_seconds``, and
    ConfigError if ``path`` is a link."""
    deadline = time.monotonic() + wait_seconds
    fd = owned_folder.open_own(path)
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
