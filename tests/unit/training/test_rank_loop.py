"""What rank 0's loop tells the coordinator, in which order, over a trainer that does nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apollo_tp.distributed.control import Control
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import RankFailedError
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import codec, commands
from tests.support.figures import step_figures
from tests.support.rank_services import RecordingServices

HELLO = commands.Hello(
    id="", protocol_version=commands.PROTOCOL_VERSION, instance_id="i", server_life="i@1", model_path="m",
    served_model_names=["m"], num_ranks=1, vocab_size=9, max_sequence_tokens=9, weight_version=7, num_parameters=1,
    optimizer="apollo", gradients="stored",
)  # fmt: skip
_OPTIMIZER = SimpleNamespace(progress=lambda: (0, 0), await_weights=lambda: None, late_weights=None)


class Services(RecordingServices):
    def hello(self, command_id: str = "") -> commands.Hello:
        self.hellos.append(command_id)
        return HELLO


class RecordingLink:
    """A coordinator that sends ``frames``; ``log`` is what it hears, with the states of the heartbeats."""

    def __init__(self, *frames: bytes) -> None:
        self.frames, self.log = list(frames), []  # type: ignore[var-annotated]

    def receive(self, timeout_seconds: float) -> bytes:
        return self.frames.pop(0)

    def send(self, reply: commands.AnyReply) -> None:
        self.log.append(type(reply).__name__)

    def working_on(self, command_id: str, weight_version: int) -> None:
        self.log.append((command_id, weight_version))


def _loop(link: RecordingLink) -> RankLoop:
    """Over a trainer whose first step is written and whose second one raises."""

    def step(samples: Any, learning_rate_scale: float, *_: Any) -> commands.StepFigures:
        if trainer.weight_version > 7:
            raise ValueError("injected")
        trainer.weight_version += 1
        return step_figures(weight_version=trainer.weight_version)

    trainer = SimpleNamespace(
        step=step, mesh=Mesh.single(TPGroup.single()), weight_version=7, device=torch.device("cpu"),
        peak_memory_bytes=lambda: 0,
        abandon_step=lambda: None, rejoin=lambda: None, optimizer=_OPTIMIZER,
    )  # fmt: skip
    return RankLoop(trainer, Services(), Control(0, 1), link)  # type: ignore[arg-type]


def _step(number: int) -> bytes:
    return codec.encode(commands.Step(id=f"j/{number}", job_id="j", job_step=number, samples=[]))


STARTED = [("", 7), "Hello"]
STEPPED = [("j/1", 7), ("", 8), "StepDone"]
FAILED = [("j/2", 8), ("", 8), "CommandFailed"]


def test_the_loop_says_who_it_is_and_then_what_it_works_on() -> None:
    """Heartbeats show the command that is executed, and the weights' version after it; each command has one reply."""
    link = RecordingLink(b"", _step(1), b"", _step(2), codec.encode(commands.Shutdown(id="s", reason="enough")))
    assert _loop(link).run() == "enough"
    assert link.log == [*STARTED, *STEPPED, *FAILED]


@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_the_loop_after_the_command_that_is_executed(busy: bool) -> None:
    """With its reply; what the coordinator sent meanwhile is left to the next trainer."""
    link = RecordingLink(_step(1), _step(2))
    loop = _loop(link)
    if busy:
        step = loop.trainer.step

        def signalled(*arguments: Any) -> commands.StepFigures:
            loop.stop("got SIGTERM")
            return step(*arguments)

        loop.trainer.step = signalled  # type: ignore[method-assign]
    else:
        loop.stop("got SIGTERM")
    assert loop.run() == "got SIGTERM"
    assert link.log == [*STARTED, *(STEPPED if busy else [])]


class Saving(Services):
    """A checkpoint that is written while training goes on, until the loop has looked ``looks`` times."""

    def __init__(self, looks: int, error: str = "") -> None:
        super().__init__()
        self.looks, self.error, self.is_saving, self.order = looks, error, False, []  # type: ignore[var-annotated]

    def save_checkpoint(self, name: str, kept: object = ()) -> None:  # type: ignore[override]
        assert not self.is_saving, "a second one beside the first"
        self.is_saving = True
        self.order.append(f"save {name}")

    def written_checkpoint(self) -> Any:
        if not self.is_saving:
            return None
        self.looks -= 1
        written = SimpleNamespace(path="/c", num_bytes=3, seconds=2.5, weight_version=7, error=self.error)
        return written if self.looks < 0 else None

    def checkpoint_written(self, path: str) -> None:
        self.is_saving = False
        self.order.append(f"written {path}")

    def record_step(self, command: commands.AnyStep, figures: commands.StepFigures) -> None:
        self.order.append(f"step {command.job_step}")


def _saving_loop(link: RecordingLink, services: Saving) -> RankLoop:
    loop = _loop(link)
    loop.services = services
    return loop


SAVE = [codec.encode(commands.SaveCheckpoint(id=f"save/{n}", name=f"c{n}")) for n in (1, 2)]
END = codec.encode(commands.Shutdown(id="s", reason="enough"))


@pytest.mark.parametrize("error", ["", "CheckpointError: rank 1: no room"])
def test_steps_are_made_while_a_checkpoint_is_written(error: str) -> None:
    """Its reply comes after theirs, with the version that was saved and for how long no step could be made."""
    link, services = RecordingLink(SAVE[0], _step(1), b"", END), Saving(2, error)
    replies: list[Any] = []
    link.send = replies.append  # type: ignore[method-assign]
    assert _saving_loop(link, services).run() == "enough"
    assert services.order == ["save c1", "step 1", f"written {'' if error else '/c'}"]
    _, stepped, saved = replies
    assert isinstance(stepped, commands.StepDone)
    assert saved.id == "save/1"
    if error:
        assert (saved.rank, saved.error, saved.message) == (0, "CheckpointError", "rank 1: no room")
    else:
        assert (saved.path, saved.num_bytes, saved.seconds, saved.weight_version) == ("/c", 3, 2.5, 7)
        assert 0 <= saved.stopped_seconds < 1


def test_what_needs_the_checkpoints_folder_waits_for_the_one_that_is_written() -> None:
    """A coordinator that was started again asks once more; nothing that was sent after that overtakes it."""
    link, services = RecordingLink(SAVE[0], SAVE[1], _step(1), b"", b"", b"", END), Saving(2)
    assert _saving_loop(link, services).run() == "enough"
    assert services.order == ["save c1", "written /c", "save c2", "written /c", "step 1"]


@pytest.mark.parametrize("how", ["a signal", "the coordinator"])
def test_the_loop_ends_once_the_checkpoint_is_written(how: str) -> None:
    link, services = RecordingLink(SAVE[0], *([END] if how == "the coordinator" else [])), Saving(3)
    loop = _saving_loop(link, services)
    if how == "a signal":
        save = services.save_checkpoint
        services.save_checkpoint = lambda *arguments: (loop.stop("enough"), save(*arguments))[1]  # type: ignore
    assert loop.run() == "enough"
    assert services.order == ["save c1", "written /c"]
    assert link.log[-1] == "CheckpointDone"


def test_a_restore_that_failed_in_the_middle_ends_the_trainer() -> None:
    """Nothing may be computed with parts of two models. The coordinator gets no answer: the request stays, and the next
    trainer completes it. A checkpoint that was refused before the first write is a failure like others."""

    def torn(name: str, restore_id: str, fallback: str) -> str:
        services.is_torn = torn_now
        raise OSError("injected")

    for torn_now in (False, True):
        restore = codec.encode(commands.RestoreCheckpoint(id="restore/1", name="c", restore_id="r"))
        link, services = RecordingLink(restore, END), Services()
        services.restore_checkpoint = torn  # type: ignore[method-assign]
        loop = _loop(link)
        loop.services = services
        if torn_now:
            with pytest.raises(RankFailedError, match="it completes the restore first"):
                loop.run()
        else:
            assert loop.run() == "enough"
        assert ("CommandFailed" in link.log) == (not torn_now)
