"""HTTP requests that vLLM's endpoint plugin (DEALER) forwards to the coordinator (ROUTER): the message types.

Plain HTTP in small frames, so that the coordinator has one route table. ``id`` is unique within one plugin socket.
"""

from __future__ import annotations

import msgspec


class TunnelRequest(msgspec.Struct, frozen=True, tag=True):
    """Head of one HTTP request. ``query`` is the raw query string; ``headers`` are pairs of latin-1 bytes; ``client`` is the
    address that it came from, if by HTTP."""

    id: int
    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: str | None = None


class TunnelBody(msgspec.Struct, frozen=True, tag=True):
    """A part of a body, of the request or of the response; ``more`` is false on the last one."""

    id: int
    data: bytes
    more: bool


class TunnelHead(msgspec.Struct, frozen=True, tag=True):
    """Status and headers of the response."""

    id: int
    status: int
    headers: list[tuple[bytes, bytes]]


class TunnelAlive(msgspec.Struct, frozen=True, tag=True):
    """The coordinator works on this request: sent at once, then every TUNNEL_ALIVE_SECONDS until the response ends."""

    id: int


class TunnelCancel(msgspec.Struct, frozen=True, tag=True):
    """The client has disconnected from the server: cancel the request."""

    id: int


class TunnelTaken(msgspec.Struct, frozen=True, tag=True):
    """Flow control: the client has received ``num_bytes`` more of the response's body, so as many more may be sent."""

    id: int
    num_bytes: int


class CoordinatorAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a coordinator on another host takes requests, over TCP with CURVE keys (in ZMQ's text form). The trainer leaves
    it in the server's folder (0600)."""

    address: str
    server_key: str
    public_key: str
    secret_key: str


TUNNEL_ALIVE_SECONDS = 2.0
TUNNEL_WINDOW_BYTES = 4 * 2**20
"""At most so much of a response's body is sent before the client has received it."""
TunnelUp = TunnelRequest | TunnelBody | TunnelCancel | TunnelTaken
TunnelDown = TunnelHead | TunnelBody | TunnelAlive
