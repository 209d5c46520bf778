"""The update lock between trainer rank 0 and vLLM's endpoint plugin: message types, and frames on a unix stream socket.

Rank 0 attaches once. Around each update it sends SyncPause (where the mode pauses), SyncRenew about twice a second, and
SyncRelease when all ranks have written. The lock is a lease: when nothing arrives for SYNC_LEASE_SECONDS, or the connection
ends, the plugin resumes the server by itself.
"""

from __future__ import annotations

import msgspec

from apollo_tp.wire.codec import encode


class SyncAttach(msgspec.Struct, frozen=True, tag=True):
    """First message. ``mode`` and ``cache`` are the values of config.SyncMode and config.CacheMode."""

    mode: str
    cache: str
    weight_version: int


class SyncPause(msgspec.Struct, frozen=True, tag=True):
    """Pause the server as the mode demands; answered when nothing runs on it any more."""


class SyncRenew(msgspec.Struct, frozen=True, tag=True):
    """Renew the lease: the trainer runs and still needs the pause. Not answered."""


class SyncRelease(msgspec.Struct, frozen=True, tag=True):
    """The weights are those of ``weight_version``: refresh the prefix cache and resume."""

    weight_version: int


class SyncAnswer(msgspec.Struct, frozen=True, tag=True):
    """Reply to SyncAttach, SyncPause and SyncRelease. ``kind`` names the request; ``error`` is empty on success."""

    kind: str
    error: str = ""


SYNC_LEASE_SECONDS = 4.0
SYNC_RENEW_SECONDS = 0.5
SyncRequest = SyncAttach | SyncPause | SyncRenew | SyncRelease
MAX_SYNC_FRAME_BYTES = 64 * 1024


def frame(message: SyncRequest | SyncAnswer) -> bytes:
    """``message`` as a frame of the lock's byte stream: four bytes of length (big-endian), then msgpack."""
    content = encode(message)
    return len(content).to_bytes(4, "big") + content
