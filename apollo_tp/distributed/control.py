"""Messages between ranks over the control group (gloo): broadcast from rank 0, gather from all to all."""

from __future__ import annotations

import torch
import torch.distributed as dist

COMMAND_BYTES = 64 * 2**10
"""A step of 4,096 tokens and their weights fits."""
VERDICT_BYTES = 4 * 2**10
LENGTH_BYTES = 8


class Control:
    """Messages between ranks over the control group: bytes from rank 0 to all, and from all to all.

    A short message takes one collective: each has a latency that a step's end and the next one's start wait for.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def broadcast(self, payload: bytes) -> bytes:
        """Rank 0's payload on every rank. One broadcast; a second one of what is beyond COMMAND_BYTES."""
        if self.size == 1:
            return payload
        head = _head(payload, COMMAND_BYTES)
        dist.broadcast(head, 0)
        length, content = _read_head(head)
        if length > COMMAND_BYTES:
            rest = _as_tensor(payload[COMMAND_BYTES:], length - COMMAND_BYTES)
            dist.broadcast(rest, 0)
            content += rest.numpy().tobytes()
        return content

    def gather(self, payload: bytes) -> list[bytes]:
        """The payload of every rank, on every rank. One all-gather; a second one of what is beyond VERDICT_BYTES."""
        if self.size == 1:
            return [payload]
        found = [_read_head(head) for head in self._gather(_head(payload, VERDICT_BYTES))]
        beyond = max(length for length, _ in found) - VERDICT_BYTES
        if beyond <= 0:
            return [content for _, content in found]
        rests = self._gather(_as_tensor(payload[VERDICT_BYTES:], beyond))
        return [(head + rest.numpy().tobytes())[:n] for (n, head), rest in zip(found, rests, strict=True)]

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return parts


def _as_tensor(payload: bytes, num_bytes: int) -> torch.Tensor:
    """``payload`` in a uint8 tensor of ``num_bytes``, filled up with zeros."""
    return torch.frombuffer(bytearray(payload.ljust(num_bytes, b"\0")), dtype=torch.uint8)


def _head(payload: bytes, num_bytes: int) -> torch.Tensor:
    """The length of ``payload`` and its first ``num_bytes``."""
    return _as_tensor(len(payload).to_bytes(LENGTH_BYTES, "little") + payload[:num_bytes], LENGTH_BYTES + num_bytes)


def _read_head(head: torch.Tensor) -> tuple[int, bytes]:
    """The length of a payload, and what of it is in its head."""
    content = head.numpy().tobytes()
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    return length, content[LENGTH_BYTES : LENGTH_BYTES + length]
