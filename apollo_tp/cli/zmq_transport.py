"""HTTP requests to the coordinator over ZMQ with CURVE keys, for programs on other hosts: a transport for ``httpx``.

    httpx.Client(base_url="http://coordinator", transport=ZmqTransport("tcp://host:8301", Path("keys/laptop.key_secret")))

``server.key`` is in the folder of the secret key, or in the folder above: both come from its ``service.zmq.keys_dir``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import zmq
import zmq.auth

from apollo_tp.errors import ConfigError, FrameError
from apollo_tp.wire import codec
from apollo_tp.wire import tunnel as tunnel_messages

CHUNK_BYTES = 2**20
SILENCE_SECONDS = 5 * tunnel_messages.TUNNEL_ALIVE_SECONDS


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"CURVE key {path}: {error}; expected a file made by `apollo-tp keys`") from error


class ZmqTransport(httpx.BaseTransport):
    """A transport over one DEALER socket, for one request at a time. Raises httpx.ConnectTimeout if nobody answers,
    httpx.ReadTimeout after silence."""

    def __init__(self, address: str, key: Path) -> None:
        public, secret = _load(key)
        if secret is None:
            raise ConfigError(f"CURVE key {key}: got a public key, expected the secret one")
        near, above = key.parent / "server.key", key.parent.parent / "server.key"
        server_public, _ = _load(near if near.exists() else above)
        self._address, self._next_id = address, 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        try:
            self._socket.curve_serverkey, self._socket.curve_publickey = server_public, public
            self._socket.curve_secretkey = secret
            self._socket.connect(address)
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            raise ConfigError(
                f"{address}, key {key}: {error}; expected tcp://HOST:PORT and keys that fit it"
            ) from error

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._next_id += 1
        path, _, query = request.url.raw_path.partition(b"?")
        head = tunnel_messages.TunnelRequest(
            self._next_id, request.method, path.decode(), query, list(request.headers.raw)
        )
        self._send(head)
        for part in request.stream:  # type: ignore[union-attr]
            for start in range(0, len(part), CHUNK_BYTES):
                self._send(tunnel_messages.TunnelBody(self._next_id, part[start : start + CHUNK_BYTES], True))
        self._send(tunnel_messages.TunnelBody(self._next_id, b"", False))
        answer = self._receive(self._next_id, httpx.ConnectTimeout)
        while isinstance(answer, tunnel_messages.TunnelAlive):
            answer = self._receive(self._next_id, httpx.ReadTimeout)
        if not isinstance(answer, tunnel_messages.TunnelHead):
            raise httpx.RemoteProtocolError(f"{self._address}: got a body, expected the head of an answer")
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(self, self._next_id))

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _send(self, message: tunnel_messages.TunnelUp) -> None:
        if not self._socket.poll(int(SILENCE_SECONDS * 1000), zmq.POLLOUT):
            raise httpx.ConnectTimeout(f"{self._address}: nobody takes requests there, or not with this key")
        self._socket.send(codec.encode(message))

    def _receive(self, identity: int, timeout: type[httpx.TimeoutException]) -> tunnel_messages.TunnelDown:
        while True:
            if not self._socket.poll(int(SILENCE_SECONDS * 1000)):
                raise timeout(
                    f"{self._address}: no answer for {SILENCE_SECONDS:g} s; is the coordinator there, and the key?"
                )
            try:
                message = codec.decode(self._socket.recv(), tunnel_messages.TunnelDown)
            except FrameError as error:
                raise httpx.RemoteProtocolError(f"{self._address}: {error}") from error
            if message.id == identity:  # other frames belong to requests that were given up
                return message  # type: ignore[no-any-return]


class _Body(httpx.SyncByteStream):
    def __init__(self, transport: ZmqTransport, identity: int) -> None:
        self._transport, self._identity, self._ended = transport, identity, False

    def __iter__(self) -> Iterator[bytes]:
        while not self._ended:
            part = self._transport._receive(self._identity, httpx.ReadTimeout)
            if isinstance(part, tunnel_messages.TunnelBody):
                self._ended = not part.more
                yield part.data

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._transport._send(tunnel_messages.TunnelCancel(self._identity))
