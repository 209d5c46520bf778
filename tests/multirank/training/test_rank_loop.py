"""What ranks do about a command that raised on one of them: go on together, or end together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import RankFailedError
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire import codec, commands
from tests.support.families import CASES
from tests.support.rank_loops import Loop, in_forward, once, out_of_memory
from tests.support.ranks import run_ranks
from tests.support.trainers import CASE

NOT_UNICODE = os.fsdecode(b"/\xff")


def test_a_launchers_signals_end_it_in_order() -> None:
    """SIGHUP too, which a terminal that closes sends, unless nohup has it ignored."""
    loop = RankLoop.__new__(RankLoop)
    reasons: list[str] = []
    loop.stop = reasons.append  # type: ignore[method-assign]
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    try:
        for number in signals:  # a suite behind nohup, or in the background, has two of them ignored
            signal.signal(number, signal.SIG_DFL)
        loop.stop_on_signals()
        for number in signals:
            signal.raise_signal(number)
        assert reasons == [f"got {number.name}" for number in signals]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        loop.stop_on_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def afterwards(method: Callable[..., object], *arguments: object, **options: object) -> None:
    method(*arguments, **options)
    out_of_memory()


def behind_comparison(trainer: Trainer) -> None:
    once(trainer.model, "finish_gradients", afterwards)


def in_write(trainer: Trainer) -> None:
    once(trainer.optimizer.update_group.backend, "write", out_of_memory)


def _fail(tp: TPGroup, checkpoint: Path, fault: Callable[[Trainer], None], at_step: int) -> list[str]:
    """Kinds of the replies to four steps, in one of which the last rank has a fault."""
    loop, kinds = Loop(tp.rank, tp.size, checkpoint), []
    for number in range(4):
        if number == at_step and tp.rank == tp.size - 1:
            fault(loop.trainer)
        kinds.append(type(loop.step(number)).__name__)
    return kinds


@pytest.mark.parametrize(
    ("fault", "at_step"), [(in_forward, 1), (behind_comparison, 0)], ids=["forward", "behind the first comparison"]
)
def test_ranks_go_on_after_one_raised_before_any_wrote(
    fault: Callable[[Trainer], None], at_step: int, checkpoints: Path
) -> None:
    """With the same collectives: none finds a gradient to compare, or a check of replicas due, that others do not."""
    expected = ["CommandFailed" if number == at_step else "StepDone" for number in range(4)]
    assert run_ranks(_fail, 2, checkpoints / CASES[CASE].checkpoint, fault, at_step) == [expected] * 2


def _fail_in_write(tp: TPGroup, checkpoint: Path) -> tuple[str, list[str]]:
    loop = Loop(tp.rank, tp.size, checkpoint)
    loop.step(0)
    if tp.rank == tp.size - 1:
        in_write(loop.trainer)
    with pytest.raises(RankFailedError) as caught:
        loop.step(1)
    dist.barrier()
    assert loop.trainer.weight_version == 2, "some ranks have written"
    return str(caught.value), [reply.message for reply in loop.sent if isinstance(reply, commands.CommandFailed)]


def test_ranks_end_together_after_one_raised_while_others_wrote(checkpoints: Path) -> None:
    """They have counted different steps, and would soon wait in different collectives. The job hears why it failed."""
    results = run_ranks(_fail_in_write, 2, checkpoints / CASES[CASE].checkpoint)
    (error, sent), (error_elsewhere, _) = results
    assert error == error_elsewhere
    assert "got [2, 1] steps by rank" in error
    assert "rank 1 raised while others wrote (OutOfMemoryError: injected). Start the trainer again" in error
    assert sent == ["injected"]


def _let_replicas_differ(tp: TPGroup, checkpoint: Path) -> tuple[str, list[int], list[int]]:
    """Found in the third step, which has written by then; a command that fails afterwards has not."""
    loop = Loop(tp.rank, tp.size, checkpoint)
    versions = []
    for number in range(3):
        if number == 2 and tp.rank == 1:
            norm = next(p for p in loop.trainer.model.parameters if p.name == "model.norm.weight")
            norm.tensor[0] += 1
        reply = loop.step(number)
        versions.append(loop.trainer.weight_version)
    in_forward(loop.trainer)
    assert isinstance(loop.step(3), commands.CommandFailed)
    assert isinstance(reply, commands.CommandFailed)
    return reply.error, [*versions, loop.trainer.weight_version], loop.noted


def test_a_step_that_finds_replicas_to_differ_counts_as_written(checkpoints: Path) -> None:
    """Caches of the old weights must not outlive it, nor may the record of the weights forget it."""
    results = run_ranks(_let_replicas_differ, 2, checkpoints / CASES[CASE].checkpoint)
    assert results == [("ReplicaError", [1, 2, 3, 3], [3, 3])] * 2


def _fail_to_save(tp: TPGroup, checkpoint: Path) -> tuple[bytes, bytes]:
    """The replies to a checkpoint that the last rank could not write its part of, and to a step after it."""
    loop = Loop(tp.rank, tp.size, checkpoint)

    def save(name: str, kept: object = ()) -> tuple[str, int]:
        with ComputeControl(loop.trainer.tp, torch.device("cpu")).agree():
            if tp.rank == tp.size - 1:
                raise FileNotFoundError(f"no such folder: {NOT_UNICODE}")
        return name, 0

    loop.services.save_checkpoint = save  # type: ignore[method-assign]
    reply = loop.execute(commands.SaveCheckpoint(id="save/1", name="first"))
    return codec.encode(reply), codec.encode(loop.step(1))


def test_the_rank_that_could_not_write_is_named_not_one_that_agreed(checkpoints: Path) -> None:
    """By all ranks, and in a reply that can be sent, whatever bytes the name of the folder has."""
    for frames in run_ranks(_fail_to_save, 2, checkpoints / CASES[CASE].checkpoint):
        failed, done = (codec.decode(frame, commands.AnyReply) for frame in frames)
        assert (failed.rank, failed.error) == (1, "FileNotFoundError")
        assert failed.message == r"no such folder: /\udcff"
        assert isinstance(done, commands.StepDone)
