"""Messages between ranks: broadcast from rank 0, gather from all to all, and agreement on whether all succeeded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import RankFailedError

COMMAND_BYTES = 64 * 2**10
"""A step of 4,096 tokens and their weights fits."""
VERDICT_BYTES = 4 * 2**10
LENGTH_BYTES = 8


class Control:
    """Messages between all ranks over the control group (the default process group, gloo on CPU).

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

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """A block of code that succeeds on all ranks, or raises on all ranks: no rank then waits for one that raised.

        Collective: every rank must enter it; one all-gather of the errors' messages at the end of the block. On the ranks
        whose block raised, that error is raised; on all others RankFailedError, naming the first rank that failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks must learn of it; raised again below
            error = caught
        text = "" if error is None else f"{type(error).__name__}: {error}"
        answers = self.gather(text.encode(errors="backslashreplace"))  # file names may hold what is not Unicode
        if error is not None:
            raise error
        for rank, answer in enumerate(answers):
            if answer:
                raise RankFailedError(f"rank {rank} failed: {answer.decode()}", rank=rank, traceback="")

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return parts


class ComputeControl(Control):
    """``gather`` and ``agree`` over the compute group, for the middle of a command.

    A rank that raises elsewhere in a command leaves the compute group, which ends the wait of the others with an error;
    over the control group they would take its report of the failure for their answer. ``gather`` and ``agree`` also wait
    until ``device`` has done what was launched before, at size 1 too.
    """

    def __init__(self, tp: TPGroup, device: torch.device) -> None:
        super().__init__(tp.rank, tp.size)
        self._tp, self._device = tp, device

    def broadcast(self, payload: bytes) -> bytes:
        raise NotImplementedError("commands come over the control group")

    def gather(self, payload: bytes) -> list[bytes]:
        if self.size == 1 and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return super().gather(payload)

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        return list(self._tp.gather_checked(mine.to(self._device), "agreement of the ranks"))


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
