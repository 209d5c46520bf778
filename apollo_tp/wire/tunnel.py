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
    """The coordinator works on this request: sent at once, and every TUNNEL_ALIVE_SECONDS while nothing else is."""

    id: int


class TunnelCancel(msgspec.Struct, frozen=True, tag=True):
    """The client of the server went away: drop the request."""

    id: int


class TunnelTaken(msgspec.Struct, frozen=True, tag=True):
    """The client has taken ``num_bytes`` more of the response's body: as many may follow (flow control)."""

    id: int
    num_bytes: int


TUNNEL_ALIVE_SECONDS = 2.0
TUNNEL_WINDOW_BYTES = 4 * 2**20
"""Of a response's body, at most so much is on its way to a client that has not taken it."""
TunnelUp = TunnelRequest | TunnelBody | TunnelCancel | TunnelTaken
TunnelDown = TunnelHead | TunnelBody | TunnelAlive
