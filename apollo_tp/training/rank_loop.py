"""The loop of every trainer rank: take commands in order, call the trainer, reply.

Rank 0 owns the socket; commands reach the other ranks as msgpack bytes over the control group (gloo on the default
process group). Idle ranks wait in a broadcast that rank 0 repeats at least once a second, so the group's timeout notices a
dead rank 0. Whatever a command raises is caught here and becomes the command's failure on all ranks: a rank that raises
leaves the compute group; the others, waiting for it in a collective, fail with a closed connection; then all agree on which
rank was first, and form the group again. If some ranks have counted an update that others have not, all end instead.
"""

from __future__ import annotations

import gc
import logging
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec
import torch
import torch.distributed as dist

from apollo_tp.distributed.control import Control
from apollo_tp.errors import CollectiveError, RankFailedError
from apollo_tp.training.coordinator_link import Link
from apollo_tp.training.step_options import StepOptions
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire import codec, commands

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
HELD_SECONDS = 0.05
"""Between two looks at a checkpoint that something waits for."""
FORWARD_PASSES = commands.Step | commands.PreferenceStep | commands.ForwardBackward | commands.Score
"""Commands that begin with a forward pass, whose layers wait for their weights."""


class Failure(msgspec.Struct, frozen=True):
    """How a command failed on a rank. ``secondary``: it failed because another rank had."""

    rank: int
    error: str
    message: str
    traceback: str
    secondary: bool


class Verdict(msgspec.Struct, frozen=True):
    """What all ranks exchange at the end of a command."""

    failure: Failure | None
    weight_version: int
    peak_memory_bytes: int
    progress: tuple[int, int]
    """Optimizer.progress(): which updates this rank has counted."""
    ended_at: float
    """When the command ended on this rank, in seconds since the epoch by its host's clock."""
    torn: bool = False
    """Services.is_torn."""


class Written(Protocol):
    """What became of a checkpoint that was written while training went on; ``error`` is "" if it is complete."""

    path: Path
    num_bytes: int
    seconds: float
    weight_version: int
    error: str


class Services(Protocol):
    """What the loop calls besides the trainer. All ranks call the same methods in the same order."""

    def form_group(self) -> None:
        """Form the trainer's compute group again after all ranks have left it. Collective."""

    def hello(self, command_id: str = "") -> commands.Hello:
        """Who these ranks are and which step they completed last; the answer to ``command_id``. Local."""

    def save_checkpoint(self, name: str, kept: Sequence[str] = ()) -> tuple[str, int] | None:
        """Write checkpoint ``name``; returns its folder and its size in bytes, or None if it is written while training goes
        on. Those that are ``kept`` are not removed for it. Collective."""

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written while training goes on; the same on all ranks."""

    def written_checkpoint(self) -> Written | None:
        """On rank 0: what became of it, once it is known; None elsewhere. Local."""

    def checkpoint_written(self, path: str) -> None:
        """It is written and complete at ``path``, or has failed (""). Local, on all ranks."""

    def keep_snapshot(self, name: str) -> tuple[str, int] | None:
        """Keep weights and optimizer state as ``name`` in host memory; returns the folder of the checkpoint that stands in
        for it once it is lost, and the bytes. None on all ranks, which do nothing, where that cannot be. Collective."""

    def restore_checkpoint(self, name: str, restore_id: str, fallback: str = "") -> str:
        """Put checkpoint ``name`` into the served memory and the optimizer; returns its folder. With ``fallback`` the
        snapshot in host memory ("" is returned), or if it is not there that checkpoint. Collective."""

    @property
    def is_torn(self) -> bool:
        """Whether the served memory has parts of two models, which only the next trainer can complete. Local."""

    def finish_command(self, weight_version: int) -> float:
        """A command has ended or failed on all ranks: resume the server if it was paused for an update. Returns for how many
        seconds it was paused. Local."""

    def record_step(self, command: commands.AnyStep, figures: commands.StepFigures) -> None:
        """All ranks have completed this step: remember it as the last one. Local."""

    def record_failure(self, weight_version: int) -> None:
        """A command failed on some rank; it may have written all the same. Local."""


class RankLoop:
    """Executes commands until Shutdown. ``link`` is rank 0's connection to the coordinator, None elsewhere."""

    def __init__(self, trainer: Trainer, services: Services, control: Control, link: Link | None) -> None:
        self.trainer = trainer
        self.services = services
        self.control = control
        self.link = link
        self._stop_reason = ""
        self._held = b""
        self._saving = commands.SaveCheckpoint(id="", name="")
        self._stopped_seconds = 0.0

    def stop(self, reason: str) -> None:
        """End ``run`` on all ranks once the command being executed is done. Has an effect on rank 0 only. Signal-safe."""
        self._stop_reason = reason

    def stop_on_signals(self) -> None:
        """Call ``stop`` on the signals that a launcher passes on: SIGTERM, SIGINT, and SIGHUP when its terminal closes."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(signum, lambda number, frame: self.stop(f"got {signal.Signals(number).name}"))

    def run(self) -> str:
        """Execute commands until Shutdown or ``stop``; returns the reason. Collective over the control group."""
        if self.link:
            self.link.working_on("", self.trainer.weight_version)
            self.link.send(self.services.hello())
        while True:
            frame = self.control.broadcast(self._next_frame())
            if not frame:
                continue
            command: commands.AnyCommand = codec.decode(frame, commands.AnyCommand)
            if isinstance(command, commands.Shutdown) and not self.services.is_saving:
                return command.reason
            if isinstance(command, commands.Shutdown):
                self._stop_reason = command.reason  # once the checkpoint is written
                continue
            reply = self.execute(command)
            if self.link and reply is not None:
                self.link.send(reply)

    def _next_frame(self) -> bytes:
        if self.link is None:
            return b""
        if (written := self.services.written_checkpoint()) is not None:
            return codec.encode(self._outcome(written))
        saving = self.services.is_saving
        if self._stop_reason and not saving:
            return codec.encode(commands.Shutdown(id="stop", reason=self._stop_reason))
        if self._held and not saving:
            frame, self._held = self._held, b""
            return frame
        if self._held or self._stop_reason:
            time.sleep(HELD_SECONDS)
            return b""
        frame = self.link.receive(POLL_SECONDS)
        if frame and saving:
            version = self.trainer.weight_version
            command = codec.decode(frame, commands.AnyCommand)
            if isinstance(command, commands.SaveCheckpoint | commands.RestoreCheckpoint):
                self._held = frame  # a coordinator that was started again may ask meanwhile
                self.link.working_on(command.id, version)
                return b""
        return frame

    def _outcome(self, written: Written) -> commands.CheckpointWritten:
        """The command that ends the writing of a checkpoint on all ranks."""
        return commands.CheckpointWritten(
            id=self._saving.id,
            path="" if written.error else str(written.path),
            num_bytes=written.num_bytes,
            seconds=written.seconds,
            stopped_seconds=self._stopped_seconds,
            weight_version=written.weight_version,
            error=written.error,
        )

    def execute(self, command: commands.AnyCommand) -> commands.AnyReply | None:
        """Execute a command; returns the reply, or None if it comes later. Collective."""
        if self.link:
            self.link.working_on(command.id, self.trainer.weight_version)
        failure: Failure | None = None
        reply: commands.AnyReply | None = None
        try:
            if not isinstance(command, FORWARD_PASSES):
                self.trainer.optimizer.await_weights()
            reply = self._dispatch(command)
        # Whatever a model, kernel or collective raises must become the job's failure on all ranks, not their end.
        except Exception as error:  # noqa: BLE001
            failure = self._describe(error)
            traceback.clear_frames(error.__traceback__)
        if failure is not None:
            # Frames of the failed step keep the process group alive; only its end wakes ranks that wait for this one.
            gc.collect()
            self.trainer.mesh.world.dissolve()
            self.trainer.abandon_step()
        verdicts = self._agree(failure)
        self.trainer.weight_version = max(v.weight_version for v in verdicts)
        paused_seconds = self.services.finish_command(
            self.trainer.weight_version
        )  # also after a failure: the server waits
        failures = [v.failure for v in verdicts if v.failure]
        if failures:
            self.services.record_failure(self.trainer.weight_version)
            reply = _failed(command, failures)
            if any(v.torn for v in verdicts):
                self._end_torn(reply)
            self._recover()
            if len({v.progress for v in verdicts}) > 1:
                self._end(reply, [v.progress[0] for v in verdicts])
        elif isinstance(reply, commands.StepDone) and isinstance(command, commands.AnyStep):
            memory = [v.peak_memory_bytes for v in verdicts]
            figures = msgspec.structs.replace(reply.figures, peak_memory_bytes=memory, paused_seconds=paused_seconds)
            lags = _lags([v.ended_at for v in verdicts], self.trainer.mesh.replicas.size)
            if lags:
                late = self.trainer.optimizer.late_weights
                figures.metrics["replica_skew_seconds"] = max(lags) + (late.seconds if late else 0.0)
            reply = commands.StepDone(id=command.id, figures=figures, replica_lag_seconds=lags)
            self.services.record_step(command, figures)
        elif isinstance(reply, commands.RestoreDone):
            reply = msgspec.structs.replace(reply, paused_seconds=paused_seconds)
        if self.link:
            self.link.working_on("", self.trainer.weight_version)
        return reply

    def _describe(self, error: Exception) -> Failure:
        message = str(error)
        lost_peer = (
            isinstance(error, dist.DistError | CollectiveError) or "onnection" in message or "pair.cc" in message
        )
        return Failure(
            rank=self.control.rank,
            error=type(error).__name__,
            message=_unicode(message),
            traceback=_unicode(traceback.format_exc()),
            secondary=self.control.size > 1 and (lost_peer or isinstance(error, RankFailedError)),
        )

    def _agree(self, failure: Failure | None) -> list[Verdict]:
        trainer = self.trainer
        memory, progress, torn = trainer.peak_memory_bytes(), trainer.optimizer.progress(), self.services.is_torn
        verdict = Verdict(failure, trainer.weight_version, memory, progress, time.time(), torn)
        answers = self.control.gather(msgspec.msgpack.encode(verdict))
        return [msgspec.msgpack.decode(answer, type=Verdict) for answer in answers]

    def _recover(self) -> None:
        """All ranks: forget the failed step and join a new compute group."""
        self.trainer.mesh.world.dissolve()
        self.trainer.rejoin()
        gc.collect()
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        self.services.form_group()

    def _end(self, reply: commands.CommandFailed, steps: list[int]) -> NoReturn:
        """Raise RankFailedError on all ranks: ranks that have counted different updates would soon enter different
        collectives."""
        if self.link:
            self.link.send(reply)
        raise RankFailedError(
            f"optimizer: got {steps} steps by rank, or other counts of updates, expected the same on all ranks; rank "
            f"{reply.rank} raised while others wrote ({reply.error}: {reply.message}). Start the trainer again: it repairs "
            "replicas and loads the last saved state",
            rank=reply.rank,
            traceback=reply.traceback,
        )

    def _end_torn(self, reply: commands.CommandFailed) -> NoReturn:
        """Raise RankFailedError on all ranks: nothing may be computed with the weights as they are."""
        raise RankFailedError(
            f"restore: got an error on rank {reply.rank} after the first write ({reply.error}: {reply.message}), expected "
            "all weights to be written. Start the trainer again: it completes the restore first",
            rank=reply.rank,
            traceback=reply.traceback,
        )

    def _save(self, command: commands.SaveCheckpoint) -> commands.AnyReply | None:
        started, version = time.monotonic(), self.trainer.weight_version
        if command.snapshot and (held := self.services.keep_snapshot(command.name)) is not None:
            fallback, size = held
            seconds = time.monotonic() - started
            return commands.CheckpointDone(
                id=command.id, path="", num_bytes=size, seconds=seconds, weight_version=version, stopped_seconds=seconds,
                fallback=fallback,
            )  # fmt: skip
        done = self.services.save_checkpoint(command.name, command.kept)
        seconds = time.monotonic() - started
        if done is None:
            self._saving, self._stopped_seconds = command, seconds
            return None
        path, size = done
        return commands.CheckpointDone(
            id=command.id, path=path, num_bytes=size, seconds=seconds, weight_version=version, stopped_seconds=seconds
        )

    def _end_saving(self, command: commands.CheckpointWritten) -> commands.AnyReply:
        self.services.checkpoint_written(command.path)
        if command.error:
            kind, _, message = command.error.partition(": ")
            return commands.CommandFailed(id=command.id, rank=0, error=kind, message=message, traceback="")
        return commands.CheckpointDone(
            id=command.id,
            path=command.path,
            num_bytes=command.num_bytes,
            seconds=command.seconds,
            weight_version=command.weight_version,
            stopped_seconds=command.stopped_seconds,
        )

    def _dispatch(self, command: commands.AnyCommand) -> commands.AnyReply | None:
        match command:
            case commands.Step():
                figures = self.trainer.step(
                    command.samples, command.learning_rate_scale, command.loss, command.max_staleness
                )
                return commands.StepDone(id=command.id, figures=figures)
            case commands.PreferenceStep():
                figures = self.trainer.preference_step(command.pairs, command.beta, command.learning_rate_scale)
                return commands.StepDone(id=command.id, figures=figures)
            case commands.ForwardBackward():
                passed = self.trainer.forward_backward(command.samples, command.loss)
                return commands.ForwardBackwardDone(id=command.id, **asdict(passed))
            case commands.OptimizerStep():
                options = StepOptions(**{f.name: getattr(command, f.name) for f in fields(StepOptions)})
                return commands.StepDone(
                    id=command.id, figures=self.trainer.optimizer_step(command.num_passes, options)
                )
            case commands.Score():
                scores = self.trainer.score(command.samples)
                return commands.ScoreDone(
                    id=command.id,
                    logprobs=scores.logprobs,
                    weights=scores.weights,
                    num_correct=scores.num_correct,
                    token_logprobs=scores.token_logprobs if command.per_token else [],
                )
            case commands.SaveCheckpoint():
                return self._save(command)
            case commands.CheckpointWritten():
                return self._end_saving(command)
            case commands.RestoreCheckpoint():
                started = time.monotonic()
                path = self.services.restore_checkpoint(command.name, command.restore_id, command.fallback)
                version, seconds = self.trainer.weight_version, time.monotonic() - started
                return commands.RestoreDone(id=command.id, path=path, seconds=seconds, weight_version=version)
            case commands.Identify():
                return self.services.hello(command.id)
            case _:
                raise TypeError(f"got command {type(command).__name__}, expected one of commands.AnyCommand")


def _lags(ended_at: list[float], num_replicas: int) -> list[float]:
    """Of each replica how many seconds after the first one its last rank ended; nothing for one replica. Ranks are in the
    order of the mesh."""
    if num_replicas == 1:
        return []
    tp_size = len(ended_at) // num_replicas
    ends = [max(ended_at[first : first + tp_size]) for first in range(0, len(ended_at), tp_size)]
    return [end - min(ends) for end in ends]


def _unicode(text: str) -> str:
    """``text`` without the lone surrogates that stand for bytes of a file's name: no message can carry them."""
    return text.encode(errors="backslashreplace").decode()


def _failed(command: commands.AnyCommand, failures: list[Failure]) -> commands.CommandFailed:
    """The reply, with the first cause: a rank that failed because of another one is not to blame."""
    first = min(failures, key=lambda f: (f.secondary, f.rank))
    log.error("command %s failed on rank %d: %s: %s", command.id, first.rank, first.error, first.message)
    return commands.CommandFailed(
        id=command.id, rank=first.rank, error=first.error, message=first.message, traceback=first.traceback
    )
