"""On every trainer rank: take commands in order, call the trainer, answer. One of the two places that catch exceptions.

Rank 0 holds the socket; commands reach the other ranks as msgpack bytes over the control group (gloo on the default
process group), which nothing else uses. Idle ranks wait in a broadcast that rank 0 answers at least once a second, so a
dead rank 0 is noticed by the group's timeout. A rank that raises in the middle of a command leaves the compute group; the
others, waiting for it in a collective, fail with a closed connection; all agree on who was first, and form the group again.
If some ranks have counted an update that others have not, all end instead.
"""

from __future__ import annotations

import gc
import logging
import signal
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, Protocol

import msgspec
import torch
import torch.distributed as dist

from apollo_tp.distributed.control import Control
from apollo_tp.errors import CollectiveError, RankFailedError
from apollo_tp.training.coordinator_link import Link
from apollo_tp.training.trainer import StepResult, Trainer
from apollo_tp.wire import commands

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


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
        hello: Callable[[str, int], commands.Hello],
        link: Link | None,
        *,
        form_group: Callable[[], None],
        on_step: Callable[[commands.Step | commands.PreferenceStep, commands.StepDone], None],
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
            command = commands.decode_command(frame)
            if isinstance(command, commands.Shutdown):
                return command.reason
            reply = self._execute(command)
            if self.link:
                self.link.send(reply)

    def _next_frame(self) -> bytes:
        if self.link is None:
            return b""
        if self._stop_reason:
            return commands.encode(commands.Shutdown(id="stop", reason=self._stop_reason))
        return self.link.receive(POLL_SECONDS)

    def _execute(self, command: commands.AnyCommand) -> commands.AnyReply:
        if self.link:
            self.link.working_on(command.id, self.trainer.weight_version)
        failure: Failure | None = None
        reply: commands.AnyReply | None = None
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
        elif isinstance(reply, commands.StepDone) and isinstance(command, commands.Step | commands.PreferenceStep):
            memory = [v.peak_memory_bytes for v in verdicts]
            reply = msgspec.structs.replace(reply, peak_memory_bytes=memory, paused_seconds=paused_seconds)
            self._last_step = (command.job_id, command.job_step)
            self._on_step(command, reply)
        assert reply is not None
        if self.link:
            self.link.working_on("", self.trainer.weight_version)
        return reply

    def _describe(self, error: Exception) -> Failure:
        lost_peer = (
            isinstance(error, dist.DistError | CollectiveError) or "onnection" in str(error) or "pair.cc" in str(error)
        )
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

    def _end(self, reply: commands.CommandFailed, steps: list[int]) -> NoReturn:
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

    def _dispatch(self, command: commands.AnyCommand) -> commands.AnyReply:
        match command:
            case commands.Step():
                result = self.trainer.step(command.samples, command.learning_rate_scale)
                return _step_done(command, result)
            case commands.PreferenceStep():
                result = self.trainer.preference_step(command.pairs, command.beta, command.learning_rate_scale)
                return _step_done(command, result)
            case commands.Score():
                scores = self.trainer.score(command.samples)
                return commands.ScoreDone(
                    id=command.id, logprobs=scores.logprobs, weights=scores.weights, num_correct=scores.num_correct
                )
            case commands.SaveCheckpoint():
                started = time.monotonic()
                path, num_bytes = self.checkpoints.save(command.name)
                return commands.CheckpointDone(
                    id=command.id,
                    path=path,
                    num_bytes=num_bytes,
                    seconds=time.monotonic() - started,
                    weight_version=self.trainer.weight_version,
                )
            case commands.Identify():
                return msgspec.structs.replace(self._hello(*self._last_step), id=command.id)
            case _:
                raise TypeError(f"got command {type(command).__name__}, expected one of commands.AnyCommand")


def _step_done(command: commands.AnyCommand, result: StepResult) -> commands.StepDone:
    return commands.StepDone(
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


def _failed(command: commands.AnyCommand, failures: list[Failure]) -> commands.CommandFailed:
    """The failure that began it: a rank that lost its peer in a collective is not to blame."""
    first = min(failures, key=lambda f: (f.secondary, f.rank))
    log.error("command %s failed on rank %d: %s: %s", command.id, first.rank, first.error, first.message)
    return commands.CommandFailed(
        id=command.id, rank=first.rank, error=first.error, message=first.message, traceback=first.traceback
    )
