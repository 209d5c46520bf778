"""On every trainer rank: take commands in order, call the trainer, answer. One of the two places that catch exceptions.

Rank 0 holds the socket; commands reach the other ranks as msgpack bytes over the control group (gloo on the default
process group), which nothing else uses. Idle ranks wait in a broadcast that rank 0 answers at least once a second, so a
dead rank 0 is noticed by the group's timeout. A rank that raises in the middle of a command leaves the compute group; the
others, waiting for it in a collective, fail with a closed connection; all agree on who was first, and form the group again.
If some ranks have counted an update that others have not, all end instead.
"""

from __future__ import annotations

import datetime
import gc
import logging
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

import msgspec
import torch
import torch.distributed as dist
import zmq

from apollo_tp import protocol
from apollo_tp.errors import RankFailedError
from apollo_tp.parallel import TPGroup
from apollo_tp.trainer import StepResult, Trainer

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 1.0
COMMAND_BYTES = 64 * 2**10
"""A step of 4,096 tokens and their weights fits."""
VERDICT_BYTES = 4 * 2**10
LENGTH_BYTES = 8


class Failure(msgspec.Struct, frozen=True):
    """What a rank says of a command that raised. ``secondary``: it only lost its peer in a collective."""

    rank: int
    error: str
    message: str
    traceback: str
    secondary: bool


class Verdict(msgspec.Struct, frozen=True):
    """What every rank tells every other at the end of a command."""

    failure: Failure | None
    weight_version: int
    peak_memory_bytes: int
    progress: tuple[int, int]
    """Of the optimizer."""


class SavesCheckpoints(Protocol):
    """Writes a checkpoint of all ranks; collective. Returns (folder, bytes)."""

    def save(self, name: str) -> tuple[str, int]: ...


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


class RankLoop:
    """Executes commands until Shutdown. ``link`` is rank 0's DEALER to the coordinator, None elsewhere.

    ``after_write(weight_version)`` is called once all ranks have ended a command, and says for how many seconds the
    server was paused for it. ``after_failure(weight_version)`` is called on all ranks if it failed on some; it may have
    written all the same.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: SavesCheckpoints,
        control: Control,
        hello: Callable[[str, int], protocol.Hello],
        link: Link | None,
        *,
        form_group: Callable[[], None],
        on_step: Callable[[protocol.Step | protocol.PreferenceStep, protocol.StepDone], None],
        last_step: tuple[str, int] = ("", 0),
        after_write: Callable[[int], float] = lambda weight_version: 0.0,
        after_failure: Callable[[int], None] = lambda weight_version: None,
    ) -> None:
        self.trainer = trainer
        self.checkpoints = checkpoints
        self.control = control
        self.link = link
        self._hello = hello
        self._form_group = form_group
        self._on_step = on_step
        self._after_write = after_write
        self._after_failure = after_failure
        self._last_step = last_step
        self._stop_reason = ""

    def stop(self, reason: str) -> None:
        """End ``run`` on all ranks once the command being executed is done. Only rank 0's word counts. Signal-safe."""
        self._stop_reason = reason

    def stop_on_signals(self) -> None:
        """Let signals end it in order: a launcher hands them on, SIGHUP too when its terminal closes."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(signum, lambda number, frame: self.stop(f"got {signal.Signals(number).name}"))

    def run(self) -> str:
        """Until a Shutdown command or ``stop``; returns the reason. Collective over the control group."""
        if self.link:
            self.link.working_on("", self.trainer.weight_version)
            self.link.send(self._hello(*self._last_step))
        while True:
            frame = self.control.broadcast(self._next_frame())
            if not frame:
                continue
            command = protocol.decode_command(frame)
            if isinstance(command, protocol.Shutdown):
                return command.reason
            reply = self._execute(command)
            if self.link:
                self.link.send(reply)

    def _next_frame(self) -> bytes:
        if self.link is None:
            return b""
        if self._stop_reason:
            return protocol.encode(protocol.Shutdown(id="stop", reason=self._stop_reason))
        return self.link.receive(POLL_SECONDS)

    def _execute(self, command: protocol.AnyCommand) -> protocol.AnyReply:
        if self.link:
            self.link.working_on(command.id, self.trainer.weight_version)
        failure: Failure | None = None
        reply: protocol.AnyReply | None = None
        try:
            reply = self._dispatch(command)
        # Whatever a model, kernel or collective raises must become the job's failure on all ranks, not their end.
        except Exception as error:  # noqa: BLE001
            failure = self._describe(error)
            traceback.clear_frames(error.__traceback__)
        if failure is not None:
            # Frames of the failed step keep the process group alive; only its end wakes ranks that wait for this one.
            gc.collect()
            self.trainer.tp.dissolve()
            self.trainer.abandon_step()
        verdicts = self._agree(failure)
        self.trainer.weight_version = max(v.weight_version for v in verdicts)
        paused_seconds = self._after_write(self.trainer.weight_version)  # also when it failed: the server waits
        failures = [v.failure for v in verdicts if v.failure]
        if failures:
            self._after_failure(self.trainer.weight_version)
            self._recover()
            reply = _failed(command, failures)
            if len({v.progress for v in verdicts}) > 1:
                self._end(reply, [v.progress[0] for v in verdicts])
        elif isinstance(reply, protocol.StepDone) and isinstance(command, protocol.Step | protocol.PreferenceStep):
            memory = [v.peak_memory_bytes for v in verdicts]
            reply = msgspec.structs.replace(reply, peak_memory_bytes=memory, paused_seconds=paused_seconds)
            self._last_step = (command.job_id, command.job_step)
            self._on_step(command, reply)
        assert reply is not None
        if self.link:
            self.link.working_on("", self.trainer.weight_version)
        return reply

    def _describe(self, error: Exception) -> Failure:
        lost_peer = isinstance(error, dist.DistError) or "onnection" in str(error) or "pair.cc" in str(error)
        return Failure(
            rank=self.control.rank,
            error=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            secondary=self.control.size > 1 and lost_peer,
        )

    def _agree(self, failure: Failure | None) -> list[Verdict]:
        trainer = self.trainer
        verdict = Verdict(failure, trainer.weight_version, trainer.peak_memory_bytes(), trainer.optimizer.progress())
        answers = self.control.gather(msgspec.msgpack.encode(verdict))
        return [msgspec.msgpack.decode(answer, type=Verdict) for answer in answers]

    def _recover(self) -> None:
        """All ranks: forget the failed step and join a new compute group."""
        self.trainer.tp.dissolve()
        self.trainer.rejoin()
        gc.collect()
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        self._form_group()

    def _end(self, reply: protocol.CommandFailed, steps: list[int]) -> NoReturn:
        """On all ranks alike: who has counted other updates takes other collectives before long."""
        if self.link:
            self.link.send(reply)
        raise RankFailedError(
            f"optimizer: got {steps} steps by rank, or other counts of updates, expected the same on all ranks; rank "
            f"{reply.rank} raised while others wrote ({reply.error}: {reply.message}). Start the trainer again: it mends "
            "replicas and loads the last saved state",
            rank=reply.rank,
            traceback=reply.traceback,
        )

    def _dispatch(self, command: protocol.AnyCommand) -> protocol.AnyReply:
        match command:
            case protocol.Step():
                result = self.trainer.step(command.samples, command.learning_rate_scale)
                return _step_done(command, result)
            case protocol.PreferenceStep():
                result = self.trainer.preference_step(command.pairs, command.beta, command.learning_rate_scale)
                return _step_done(command, result)
            case protocol.Score():
                scores = self.trainer.score(command.samples)
                return protocol.ScoreDone(
                    id=command.id, logprobs=scores.logprobs, weights=scores.weights, num_correct=scores.num_correct
                )
            case protocol.SaveCheckpoint():
                started = time.monotonic()
                path, num_bytes = self.checkpoints.save(command.name)
                return protocol.CheckpointDone(
                    id=command.id,
                    path=path,
                    num_bytes=num_bytes,
                    seconds=time.monotonic() - started,
                    weight_version=self.trainer.weight_version,
                )
            case protocol.Identify():
                return msgspec.structs.replace(self._hello(*self._last_step), id=command.id)
            case _:
                raise TypeError(f"got command {type(command).__name__}, expected one of protocol.AnyCommand")


def _step_done(command: protocol.AnyCommand, result: StepResult) -> protocol.StepDone:
    return protocol.StepDone(
        id=command.id,
        loss=result.loss,
        num_tokens=result.num_tokens,
        num_loss_tokens=result.num_loss_tokens,
        padding_share=result.padding_share,
        num_micro_batches=result.num_micro_batches,
        grad_norm=result.outcome.grad_norm,
        learning_rate=result.outcome.learning_rate,
        weight_version=result.weight_version,
        step_seconds=result.step_seconds,
        forward_seconds=result.forward_seconds,
        backward_seconds=result.backward_seconds,
        optimizer_seconds=result.optimizer_seconds,
        token_accuracy=result.token_accuracy,
        gradients=result.gradients,
        skipped=result.outcome.skipped,
        metrics=result.metrics,
    )


def _failed(command: protocol.AnyCommand, failures: list[Failure]) -> protocol.CommandFailed:
    """The failure that began it: a rank that lost its peer in a collective is not to blame."""
    first = min(failures, key=lambda f: (f.secondary, f.rank))
    log.error("command %s failed on rank %d: %s: %s", command.id, first.rank, first.error, first.message)
    return protocol.CommandFailed(
        id=command.id, rank=first.rank, error=first.error, message=first.message, traceback=first.traceback
    )


class Link:
    """Rank 0's DEALER to the coordinator, with a thread of its own that sends heartbeats whatever the ranks do.

    ZMQ sockets belong to one thread: the thread owns the DEALER, and passes frames through two inproc pairs.
    """

    def __init__(self, address: str, alive: Callable[[], None]) -> None:
        self._alive = alive
        self._context = zmq.Context()
        self._pair = self._context.socket(zmq.PAIR)
        self._pair.bind("inproc://link")
        self._state = ("", 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._relay, args=(address,), name="coordinator-link", daemon=True)
        self._thread.start()

    def send(self, reply: protocol.AnyReply) -> None:
        """Queue a reply for the coordinator."""
        self._pair.send(protocol.encode(reply))

    def receive(self, timeout_seconds: float) -> bytes:
        """The next command's frame, or b"" after ``timeout_seconds``. Raises what ``alive`` raises."""
        self._alive()
        return self._pair.recv() if self._pair.poll(int(timeout_seconds * 1000)) else b""

    def working_on(self, command_id: str, weight_version: int) -> None:
        """What heartbeats say from now on."""
        self._state = (command_id, weight_version)

    def close(self, goodbye: protocol.Goodbye) -> None:
        """Say why the ranks leave, and end the thread."""
        self.send(goodbye)
        self._stop.set()
        self._thread.join(5)
        self._pair.close(0)
        self._context.destroy(linger=1000)

    def _relay(self, address: str) -> None:
        dealer, pair = self._context.socket(zmq.DEALER), self._context.socket(zmq.PAIR)
        dealer.setsockopt(zmq.LINGER, 1000)
        dealer.connect(address)
        pair.connect("inproc://link")
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(pair, zmq.POLLIN)
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            ready = dict(poller.poll(100))
            if dealer in ready:
                pair.send(dealer.recv())
            if pair in ready:
                dealer.send(pair.recv())
            elif self._stop.is_set():
                break
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                with suppress(zmq.Again):  # the coordinator is gone or slow: heartbeats may be lost
                    busy, version = self._state
                    dealer.send(
                        protocol.encode(protocol.Heartbeat(weight_version=version, busy_with=busy)), zmq.NOBLOCK
                    )
        dealer.close()
        pair.close(0)


def compute_group(tp: TPGroup, device: torch.device, timeout_seconds: float) -> None:
    """Form ``tp``'s process group for ``device``: NCCL on CUDA, gloo on CPU. Collective."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    tp.form(backend, datetime.timedelta(seconds=timeout_seconds))
