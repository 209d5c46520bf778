"""ZMQ over TCP for programs on other hosts, only with CurveZMQ (RFC 26).

``keys_dir`` holds ``server.key_secret``, which only the coordinator needs, and ``clients/*.key``, the public keys that
may connect. A client needs ``server.key`` and its own ``NAME.key_secret``. Files are those of ``zmq.auth``. The
requests are the tunnel's, so that tokens, limits and routes are those of HTTP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from apollo_tp.config import ZmqConfig
from apollo_tp.errors import ConfigError

SERVER, CLIENTS = "server", "clients"


def create_keys(folder: Path, client: str) -> list[Path]:
    """Make what is missing of the server's key pair and of ``client``'s; returns the files that were written.

    Files are 0600 and folders 0700. An existing key is never replaced. Raises ConfigError for a name that is no file name.
    """
    if not client.replace("-", "").replace("_", "").isalnum() or client == SERVER:
        raise ConfigError(f"client: got {client!r}, expected letters, digits, - and _, and not {SERVER!r}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / CLIENTS).mkdir(mode=0o700, exist_ok=True)
    written = []
    for where, name in ((folder, SERVER), (folder / CLIENTS, client)):
        if (where / f"{name}.key").exists():
            continue
        previous = os.umask(0o077)
        try:
            written += [Path(path) for path in zmq.auth.create_certificates(where, name)]
        finally:
            os.umask(previous)
    return written


class CurveListener:
    """The keys of a coordinator, and the authenticator that lets only known clients in."""

    def __init__(self, context: zmq.asyncio.Context, config: ZmqConfig) -> None:
        folder = Path(config.keys_dir or "")
        secret, clients = folder / f"{SERVER}.key_secret", folder / CLIENTS
        if config.keys_dir is None or not secret.is_file() or not list(clients.glob("*.key")):
            raise ConfigError(
                f"service.zmq.keys_dir: got {config.keys_dir!r}, expected a folder with {SERVER}.key_secret and "
                f"{CLIENTS}/*.key, since ZMQ over TCP is only served with CURVE keys; make them with `apollo-tp keys DIR`"
            )
        if secret.stat().st_mode & 0o077:
            raise ConfigError(
                f"{secret}: got mode {secret.stat().st_mode & 0o777:o}, expected 600: others can read it; chmod 600"
            )
        self.address = f"tcp://{config.host}:{config.port}"
        self._public, self._secret = zmq.auth.load_certificate(secret)
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=clients)

    def bind(self, socket: zmq.Socket[Any]) -> None:
        """Bind a ROUTER socket that accepts only CURVE connections. Raises ConfigError if the address cannot be bound."""
        assert self._secret is not None
        socket.curve_secretkey, socket.curve_publickey, socket.curve_server = self._secret, self._public, True
        try:
            socket.bind(self.address)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"service.zmq.host and port: got {self.address}, which cannot be bound ({error}); expected a free port"
            ) from error

    def close(self) -> None:
        self._authenticator.stop()
