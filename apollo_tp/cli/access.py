"""Where the coordinator is, and the token that it asks for."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from apollo_tp.cli.answers import RefusedError
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import instance_folder, processes

URL_VARIABLE = "APOLLO_TP_URL"
TOKEN_VARIABLE = "APOLLO_TP_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8300"
HTTP = ("http://", "https://")


class CoordinatorFile(msgspec.Struct):
    """``coordinator.json`` in a server's runtime folder, or ``coordinator_waiting.json`` while there is no server: where a
    coordinator listens, and which process it is."""

    url: str
    pid: int


def find_url() -> str:
    """$APOLLO_TP_URL, else the address that the only running coordinator wrote down, else the default.

    Raises RefusedError if several run.
    """
    if url := os.environ.get(URL_VARIABLE):
        return url
    try:
        base = instance_folder.base_dir()
        files = [*sorted(base.glob("*/coordinator.json")), *base.glob("coordinator_waiting.json")]
        found = [msgspec.json.decode(file.read_bytes(), type=CoordinatorFile) for file in files]
    except (ConfigError, OSError, ValueError):
        return DEFAULT_URL
    alive = [entry.url for entry in found if processes.ProcessId.of(entry.pid) is not None]
    if len(alive) > 1:
        raise RefusedError(f"{len(alive)} coordinators run here: choose one with --url: {', '.join(alive)}")
    return alive[0] if alive else DEFAULT_URL


def check_scheme(option: str, url: str, *schemes: str) -> None:
    """Raise ConfigError unless ``url``, the value of ``option``, begins with one of ``schemes``."""
    if not url.lower().startswith(schemes):
        raise ConfigError(f"{option}: got {url!r}, expected it to begin with {' or '.join(schemes)}")


def coordinator_headers(token_file: Path | None) -> dict[str, str]:
    """The header with the token of ``token_file``, else of $APOLLO_TP_TOKEN; empty without one. Raises ConfigError.

    The coordinator reads the same file. The token is the last one in it, without its scope.
    """
    if token_file is None:
        source, text = f"${TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE, "")
    else:
        source, text = f"--token-file {token_file}", token_file.read_text(errors="surrogateescape")
    return bearer(source, (text.strip().splitlines() or [""])[-1].rpartition(":")[2])


def bearer(source: str, token: str) -> dict[str, str]:
    """The Authorization header of ``token``; empty without one. Raises ConfigError, naming ``source``, not the token."""
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"{source}: got a token with other characters, expected printable ASCII, as HTTP headers need"
        )
    return {"Authorization": f"Bearer {token}"} if token else {}
