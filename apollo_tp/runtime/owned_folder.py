"""Which folders on disk we may use as our own, and what we may remove from them. No torch.

Options name folders, and users may name the wrong one: their home, a folder of somebody else, a link. So a folder becomes
ours only while it is empty, and a marker file in it records that. Files are removed from our folders only, and only if we
gave them their names. Each removal is logged, and so is each file that was to be removed but was not.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from apollo_tp.errors import ConfigError

log = logging.getLogger(__name__)

SHOWN_NAMES = 5
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""No setting causes these errors, so OSErrors with them are raised unchanged."""


def make_folder(path: Path, option: str) -> Path:
    """Create ``path`` if it is missing (0700), and return it. Raises ConfigError naming ``option`` if it cannot be
    created or is not a folder."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        if path.is_symlink():
            got = f"a link to {os.readlink(path)}, where no folder is"
        else:
            got = (
                "something that is no folder" if os.path.lexists(path) else f"a failure to create it ({error.strerror})"
            )
        raise ConfigError(
            f"{option} {path.absolute()}: got {got}, expected a folder, or a place where one can be created; set another"
        ) from error
    return path


def private_folder(path: Path, option: str) -> Path:
    """Create ``path`` as 0700 if it is missing, and return it. Raises ConfigError naming ``option`` if it is a link, if
    another user owns it, if others can read or write it, or if this process cannot."""
    info = make_folder(path, option).lstat()
    if stat.S_ISLNK(info.st_mode):
        raise ConfigError(
            f"{option} {path.absolute()}: got a link to {os.readlink(path)}, expected the folder itself; set "
            f"{path.resolve()}"
        )
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"{option} {path.absolute()}: got owner {info.st_uid} and mode {stat.filemode(info.st_mode)}, expected a folder "
            f"of user {os.geteuid()} that nobody else can read or write; chmod 700 it if it is yours, or set another"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(
            f"{option} {path.absolute()}: got mode {stat.filemode(info.st_mode)} or a read-only file system, expected a "
            "folder that can be written; chmod 700 it, or set another"
        )
    return path


def claim(path: Path, kind: str, option: str, recognise: Callable[[Path], bool] = lambda folder: False) -> Path:
    """Make ``path`` our folder of this ``kind``: a new one, an empty one, one that we marked earlier, or one from before
    there were markers (``recognise`` returns True for it). Raises ConfigError naming ``option`` for any other folder, and
    as ``private_folder`` does."""
    is_new = not os.path.lexists(path)
    private_folder(path, option)
    if is_marked(path, kind):
        return path
    names = os.listdir(path)
    if names and not recognise(path):
        raise ConfigError(
            f"{option} {path.absolute()}: got a folder that holds {some(names)} and was not made by apollo_tp for this "
            "purpose, expected a new or an empty one, in which files may be written and removed; set another"
        )
    mark(path, kind)
    fsync(path)
    if is_new:
        with contextlib.suppress(PermissionError):  # a parent that may be entered but not read
            fsync(path.absolute().parent)
    return path


def marker(folder: Path, kind: str) -> Path:
    """The path of the empty file that marks ``folder`` as ours."""
    return folder / f".apollo_tp_{kind}"


def mark(folder: Path, kind: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(marker(folder, kind), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))


def is_marked(folder: Path, kind: str) -> bool:
    """Whether ``folder`` is one that we marked; False for a link to one."""
    try:
        return stat.S_ISDIR(folder.lstat().st_mode) and stat.S_ISREG(marker(folder, kind).lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def open_own(path: Path) -> int:
    """Open a file that only we write, for reading and writing; returns its descriptor. Created as 0600 if it is missing.
    Raises ConfigError for a symbolic or hard link, which may lead to a file that is not ours, and for anything but a
    file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _not_own_file(path) from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        os.close(fd)
        raise _not_own_file(path)
    return fd


def _not_own_file(path: Path) -> ConfigError:
    return ConfigError(
        f"{path.absolute()}: got {_what(path)}, expected a file that apollo_tp made; move it away, or set another folder"
    )


def _what(path: Path) -> str:
    info = path.lstat()
    return f"{stat.filemode(info.st_mode)} of user {info.st_uid} with {info.st_nlink} name(s)"


def remove_file(path: Path, why: str) -> bool:
    """Remove a file or socket of this user, and return whether it is gone. A link, a folder, or a file of another user is
    left. Raises nothing."""
    try:
        info = path.lstat()
        if info.st_uid != os.geteuid() or not (stat.S_ISREG(info.st_mode) or stat.S_ISSOCK(info.st_mode)):
            log.warning("%s is left alone, since it is %s; it was to be removed: %s", path, _what(path), why)
            return False
        path.unlink()
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning("%s could not be removed (%s): %s", path, why, error)
        return False
    log.info("%s removed: %s", path, why)
    return True


def remove_tree(folder: Path, why: str, kind: str, shown: Path | None = None) -> bool:
    """Remove a folder that is marked as of this ``kind`` with its contents, and return whether it is gone.

    The marker is removed last, so that a folder whose removal was interrupted is still known as ours. Any other folder, and
    a link, is left. Raises nothing. ``shown`` is the name in the log, if not that of ``folder``.
    """
    if not os.path.lexists(folder):
        return True
    if not is_marked(folder, kind):
        log.warning(
            "%s is left alone, since apollo_tp has not marked it as its own; it was to be removed: %s", folder, why
        )
        return False
    own = marker(folder, kind)
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != own.name:
                os.unlink(entry.path)
        own.unlink()
        folder.rmdir()
    except OSError as error:
        log.warning("%s could not be removed (%s): %s", folder, why, error)
        return False
    log.info("%s removed: %s", shown or folder, why)
    return True


def free_socket(path: Path) -> None:
    """Remove a unix socket that an ended process left, so that ``path`` can be bound. Raises ConfigError if ``path`` is
    anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path.absolute()}: got {_what(path)}, expected nothing or a socket; move it away")
        path.unlink()
    except FileNotFoundError:
        pass


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are, for a message."""
    ordered = sorted(names)
    more = len(ordered) - SHOWN_NAMES
    return ", ".join(map(repr, ordered[:SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def fsync(path: Path) -> None:
    """Flush a file to disk, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
