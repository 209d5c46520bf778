"""The private folder through which a server and its trainer find each other. No torch.

    <base>/                       0700, owned by this user
      claims.lock                 held (flock) by a server while it claims its instance id
      <instance id>/              one per vLLM server
        rank0.json, rank1.json    manifests, written under a temporary name and renamed
        serving.json              written by the API server once the engine is up (without one, by the first worker)
        served_tokenizer.json     the tokenizer that it uses
        apollo_tp_server.lock     held (flock) by the server's first process, and those forked from it
        weights.json              how the served weights have changed since they were loaded (checkpoint/lineage.py)
        trainer.lock              held (flock) by the one trainer of this server
        ranks.sock                ZMQ, bound by the coordinator: trainer rank 0 connects
        coordinator.sock          ZMQ, bound by the coordinator: the server's plugin forwards HTTP requests
        sync.sock                 a stream, bound by the server's plugin: trainer rank 0 takes the update lock
        coordinator.json          address and process id of the coordinator, for the command line
        coordinator_tcp.json      address and keys of a coordinator on another host, for the plugin
        capture.json              there while a trainer runs that stores completions, for the plugin
        coordinator_settings.json what trainer rank 0 starts the coordinator with

The base is $APOLLO_TP_RUNTIME_DIR, else $XDG_RUNTIME_DIR/apollo_tp, else /tmp/apollo_tp-<uid>.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_tp.errors import ApolloTpError, ConfigError, TrainerBusyError
from apollo_tp.runtime import owned_folder
from apollo_tp.runtime.private_files import INSTANCE_FILES, RUNTIME_DIR_VARIABLE, SERVER_LOCK, locked, private_dir

INSTANCE_VARIABLE = "APOLLO_TP_INSTANCE"
TOKEN_VARIABLE = "APOLLO_TP_TOKEN"
RANKS_SOCKET = "ranks.sock"
COORDINATOR_SOCKET = "coordinator.sock"
SYNC_SOCKET = "sync.sock"
ADDRESS_FILE = "coordinator.json"
TCP_FILE = "coordinator_tcp.json"
SETTINGS_FILE = "coordinator_settings.json"
CAPTURE_FILE = "capture.json"
TRAINER_LOCK = "trainer.lock"
# sockaddr_un.sun_path holds 108 bytes with its terminating zero
MAX_SOCKET_PATH_BYTES = 107


def base_dir(explicit: str | None = None) -> Path:
    """The base folder (see the module docstring), created if missing."""
    if explicit or os.environ.get(RUNTIME_DIR_VARIABLE):
        return private_dir(Path(explicit or os.environ[RUNTIME_DIR_VARIABLE]))
    if os.environ.get("XDG_RUNTIME_DIR"):
        return private_dir(Path(os.environ["XDG_RUNTIME_DIR"]) / "apollo_tp")
    return private_dir(Path(tempfile.gettempdir()) / f"apollo_tp-{os.getuid()}")


def instance_dir(instance_id: str, base: Path | None = None) -> Path:
    """The folder of one server, created if missing. Raises ConfigError if the id is not a plain name, or if the folder has
    files and none of them is a server's: with the base in a home, an id may be the name of a folder there."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", instance_id):
        raise ConfigError(f"instance id: got {instance_id!r}, expected up to 64 letters, digits, '_', '-', '.'")
    folder = private_dir((base or base_dir()) / instance_id)
    if (names := os.listdir(folder)) and not any(map(INSTANCE_FILES.fullmatch, names)):
        raise ConfigError(
            f"instance id {instance_id}: got {folder}, which holds {owned_folder.some(names)} and no file of a server, "
            f"expected a new or an empty folder; set ${INSTANCE_VARIABLE} or ${RUNTIME_DIR_VARIABLE} to another"
        )
    return folder


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


@contextmanager
def trainer_lock(folder: Path) -> Iterator[None]:
    """Be the one trainer of a server within the context. Raises TrainerBusyError if another process is."""

    def refuse(holder: str) -> ApolloTpError:
        return TrainerBusyError(
            f"server {folder.name}: got a second trainer, expected one; process {holder} trains it already. "
            "Stop that one, or name another server with server.instance=..."
        )

    with locked(folder / TRAINER_LOCK, refuse):
        yield


def remove_instance(folder: Path) -> None:
    """Remove the folder of a server that ended: the files that servers and trainers write, the server's lock last, and the
    folder itself if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    why = f"server {folder.name} has ended"
    names = os.listdir(folder)
    others = [name for name in names if not INSTANCE_FILES.fullmatch(name)]
    own = sorted(set(names) - {*others, SERVER_LOCK})
    gone = [owned_folder.remove_file(folder / name, why) for name in own]
    if others:
        owned_folder.log.warning("%s: left alone, since no server wrote it: %s", folder, owned_folder.some(others))
    elif all(gone) and owned_folder.remove_file(folder / SERVER_LOCK, why):
        with contextlib.suppress(OSError):  # a new file has been written there
            folder.rmdir()
