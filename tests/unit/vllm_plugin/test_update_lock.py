"""The update lock between trainer and vLLM's plugin: who pauses and resumes, and what a dead or silent trainer leaves."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apollo_tp.config import CacheMode, SyncMode
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import DeadlineError, ServerGoneError
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.training import update_gate
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.training.update_gate import Lock, UpdateGate
from apollo_tp.wire import commands
from apollo_tp.wire import update_lock as lock_messages
from tests.support.locked_server import LEASE_SECONDS, Plugin, attach, eventually, options
from tests.support.rank_services import RecordingServices


@pytest.mark.parametrize(
    ("mode", "cache", "expected"),
    [
        (SyncMode.step_lock, CacheMode.none, ["no salt", "keep", "resume"]),
        (SyncMode.drain, CacheMode.reset, ["no salt", "keep", "reset", "resume", "wait", "reset", "resume"]),
        # emptied while nothing runs, though the update was written while it did
        (SyncMode.hogwild, CacheMode.reset, ["no salt", *["keep", "reset", "resume"] * 2]),
        (SyncMode.hogwild, CacheMode.salt, ["no salt", "salt apollo-7-1", "salt apollo-8-2"]),
        (
            SyncMode.drain,
            CacheMode.salt,
            ["no salt", "salt apollo-7-1", "salt apollo-7-2", "wait", "salt apollo-8-3", "resume"],
        ),
    ],
)
def test_what_the_engine_is_asked_around_an_update(
    plugin: Plugin, mode: SyncMode, cache: CacheMode, expected: list[str]
) -> None:
    """Pause, refresh the cache, resume: in this order, and only what the options say."""
    lock = attach(plugin, options(mode, cache))
    gate = UpdateGate(mode, TPGroup.single(), torch.device("cpu"), lock)
    gate.before_write()
    assert plugin.vllm.paused == (mode is not SyncMode.hogwild)
    gate.after_step(8)
    assert plugin.vllm.calls == expected
    gate.after_step(8)  # a command that wrote nothing
    assert plugin.vllm.calls == expected
    assert (plugin.folder / instance_folder.SYNC_SOCKET).stat().st_mode & 0o077 == 0
    lock.close()


def test_vllm_is_told_each_weight_version_before_it_runs_again(plugin: Plugin) -> None:
    """Where it has a call for it; when the trainer comes, and within each pause. A failure is logged, and no more."""
    told: list[tuple[str, bool]] = []

    async def update_weight_version(version: str) -> None:
        told.append((version, plugin.vllm.paused))
        if version == "9":
            raise RuntimeError("injected")

    plugin.vllm.update_weight_version = update_weight_version  # type: ignore[attr-defined]
    lock = attach(plugin, options(SyncMode.step_lock))
    for version in (8, 9):
        lock.pause()
        lock.release(version)
    assert told == [("7", False), ("8", True), ("9", True)]
    assert not plugin.vllm.paused
    lock.close()


class _SlowToPause:
    """A lock whose server takes five seconds of ``clock`` to pause, or fails to."""

    def __init__(self, clock: list[float], error: Exception | None = None) -> None:
        self.clock, self.error, self.released = clock, error, []  # type: ignore[var-annotated]

    def pause(self, patience: float) -> None:
        self.clock[0] += 5.0
        if self.error:
            raise self.error

    def release(self, weight_version: int) -> None:
        self.released.append(weight_version)


@pytest.mark.parametrize(
    ("mode", "seconds"), [(SyncMode.hogwild, 0.0), (SyncMode.step_lock, 2.0), (SyncMode.drain, 2.0)]
)
def test_the_pause_is_measured_without_the_wait_for_it(
    mode: SyncMode, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests run on until then."""
    clock = [100.0]
    monkeypatch.setattr(update_gate, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lock = _SlowToPause(clock)
    gate = UpdateGate(mode, TPGroup.single(), torch.device("cpu"), lock)  # type: ignore[arg-type]
    for version in (8, 9):
        gate.before_write()
        clock[0] += 2.0
        assert gate.after_step(version) == seconds
        assert gate.after_step(version) == 0.0
    assert lock.released == [8, 9]
    lock.error = DeadlineError("injected")
    with pytest.raises(DeadlineError) if gate.pauses else contextlib.nullcontext():
        gate.before_write()
    assert gate.after_step(9) == 0.0
    assert lock.released == [8, 9, 9], "whoever asked for a pause gives it back"


def test_a_trainer_that_renews_keeps_the_pause_and_one_that_leaves_ends_it(plugin: Plugin) -> None:
    """The pause outlives the lease while rank 0 lives, and ends at once with its connection."""
    lock = attach(plugin, options(SyncMode.step_lock), [processes.ProcessId.of(os.getpid())])
    lock.pause()
    time.sleep(1.5 * LEASE_SECONDS)
    assert plugin.vllm.paused
    lock.close()
    assert eventually(lambda: not plugin.vllm.paused) < 1


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_any_dead_rank_loses_the_lease(plugin: Plugin, dead: int, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 is alive and waits for a dead rank: the server is resumed all the same, and rank 0 is told."""
    ranks = [processes.ProcessId.of(os.getpid())] * 3
    ranks[dead] = processes.ProcessId(2**22 + 1, 0)
    lock = attach(plugin, options(SyncMode.step_lock), ranks)
    lock.pause()
    assert eventually(lambda: not plugin.vllm.paused) < 2 * LEASE_SECONDS
    lock.release(8)
    assert "the lease ran out" in caplog.text
    lock.close()


def test_a_rank_that_failed_loses_the_lease_while_all_run(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 waits for a rank that raised, in a collective that may take minutes to give up. Until all ranks have stopped to
    write the pause is kept, and no longer. A later step pauses the server as before."""
    monkeypatch.setattr(update_gate, "FAILURE_SECONDS", 1.5 * LEASE_SECONDS)
    alarm = Alarm(1, [processes.ProcessId.of(os.getpid())] * 2, bytearray(8))
    lock = Lock(plugin.folder, options(SyncMode.step_lock), 7, alarm)
    lock.pause()
    alarm.ring()
    time.sleep(LEASE_SECONDS)
    assert plugin.vllm.paused, "its writes may not be over"
    assert eventually(lambda: not plugin.vllm.paused) < 2.5 * LEASE_SECONDS
    lock.release(8)
    assert "the lease ran out" in caplog.text
    alarm.next_epoch()
    lock.pause()
    time.sleep(1.5 * LEASE_SECONDS)
    assert plugin.vllm.paused
    lock.release(9)
    lock.close()


def test_a_pause_that_lasts_too_long_is_given_up(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks run and none has failed, but the step does not end: all are told to give it up, and the server resumes."""
    monkeypatch.setattr(update_gate, "FAILURE_SECONDS", 0.2)
    alarm = Alarm(0, [processes.ProcessId.of(os.getpid())], bytearray(4))
    lock = Lock(plugin.folder, replace(options(SyncMode.step_lock), max_pause_seconds=LEASE_SECONDS), 7, alarm)
    lock.pause()
    time.sleep(LEASE_SECONDS / 2)
    assert not alarm.is_ringing()
    assert eventually(alarm.is_ringing) < LEASE_SECONDS
    assert eventually(lambda: not plugin.vllm.paused) < 2 * LEASE_SECONDS
    lock.close()


def test_a_restore_may_keep_the_server_paused_for_longer(plugin: Plugin) -> None:
    """Half of it cannot be given up."""
    alarm = Alarm(0, [processes.ProcessId.of(os.getpid())], bytearray(4))
    lock = Lock(plugin.folder, replace(options(SyncMode.step_lock), max_pause_seconds=LEASE_SECONDS / 2), 7, alarm)
    lock.pause(10.0)
    time.sleep(1.5 * LEASE_SECONDS)
    assert not alarm.is_ringing()
    assert plugin.vllm.paused
    lock.release(8)
    lock.close()


@pytest.mark.parametrize("cache", CacheMode)
def test_a_silent_trainer_loses_the_lease_and_may_go_on(
    plugin: Plugin, cache: CacheMode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All ranks are alive, but no renewal comes (a stopped process): the next update pauses the server again."""
    monkeypatch.setattr(lock_messages, "SYNC_RENEW_SECONDS", 100.0)
    lock = attach(plugin, options(SyncMode.step_lock, cache), [processes.ProcessId.of(os.getpid())])
    lock.pause()
    assert LEASE_SECONDS / 2 < eventually(lambda: not plugin.vllm.paused) < 2 * LEASE_SECONDS
    lock.release(8)
    assert "the lease ran out" in caplog.text
    caplog.clear()
    lock.pause()
    assert plugin.vllm.paused
    lock.release(9)
    assert not plugin.vllm.paused
    assert caplog.text == ""
    lock.close()


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (CacheMode.none, ["resume"]),
        (CacheMode.reset, ["resume", "keep", "reset", "resume"]),
        (CacheMode.salt, ["resume", "salt apollo-7-3"]),
    ],
)
def test_a_trainer_that_ends_during_its_write_leaves_no_cache_of_half_a_step(
    plugin: Plugin, cache: CacheMode, expected: list[str]
) -> None:
    """Its weights are neither the old nor the new ones: what is computed with them must not be mixed with either."""
    lock = attach(plugin, options(SyncMode.step_lock, cache))
    lock.pause()
    begun = len(plugin.vllm.calls)
    lock.close()
    eventually(lambda: plugin.lock._attached is None)
    assert plugin.vllm.calls[begun:] == expected
    assert not plugin.vllm.paused


@pytest.mark.parametrize("end", ["close", "release"])
def test_a_drain_that_is_given_up_leaves_no_pause(plugin: Plugin, end: str) -> None:
    """A request that never ends: the step fails after the deadline, and new requests run again."""
    plugin.vllm.busy = True
    lock = attach(plugin, options(SyncMode.drain, timeout_seconds=0.3))
    with pytest.raises(DeadlineError, match=r"sync\.timeout_seconds"):
        lock.pause()
    lock.close() if end == "close" else lock.release(7)
    eventually(lambda: not plugin.vllm.paused)
    plugin.vllm.busy = False  # vLLM answers the call that nobody waits for any more
    time.sleep(0.1)
    assert not plugin.vllm.paused
    if end == "release":
        lock.pause()
        assert plugin.vllm.paused
        lock.release(8)
        lock.close()


@pytest.mark.parametrize("end", ["close", "release"])
def test_a_pause_that_is_given_up_before_its_turn_leaves_vllm_to_others(plugin: Plugin, end: str) -> None:
    """It waits for somebody else's drain. When that is over, nobody is left who would free the engine for vLLM's own /pause
    and /resume, unless the plugin does."""
    plugin.vllm.busy = True
    theirs = plugin.others("pause_generation", mode="wait", clear_cache=True)
    lock = attach(plugin, options(SyncMode.step_lock, timeout_seconds=0.3))
    with pytest.raises(DeadlineError):
        lock.pause()
    lock.close() if end == "close" else lock.release(7)
    eventually(lambda: plugin.lock._pausing is None)
    plugin.vllm.busy = False
    theirs.result(5)
    plugin.run_ready()
    plugin.others("resume_generation").result(5)
    plugin.others("pause_generation", mode="abort", clear_cache=True).result(5)
    assert plugin.vllm.calls == ["wait", "no salt", "resume", "abort"]
    if end == "release":
        lock.close()


@pytest.mark.parametrize("call", ["pause_generation", "resume_generation", "reset_prefix_cache"])
def test_a_failure_of_vllms_engine_is_told_to_the_trainer(
    plugin: Plugin, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure goes the same way: logged, answered, and the connection stays."""
    lock = attach(plugin, options(SyncMode.step_lock, CacheMode.reset))

    async def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("EngineDeadError injected")

    if call == "reset_prefix_cache":
        plugin.vllm.reset_prefix_cache = fails  # type: ignore[method-assign]
    else:
        engine = plugin.lock._engine
        setattr(engine, "_" + call.removesuffix("_generation"), fails)
    if call == "pause_generation":
        with pytest.raises(ServerGoneError, match="vLLM did not pause: EngineDeadError injected"):
            lock.pause()
    else:
        lock.pause()
        lock.release(8)
        expected = "could not be resumed" if call == "resume_generation" else "keeps entries of older weights"
        told = [record.getMessage() for record in caplog.records if record.name == "apollo_tp"]
        assert [f"{expected}: EngineDeadError injected" in message for message in told] == [True]
    assert plugin.lock._attached is not None
    lock.close()


def test_a_step_that_raises_during_its_write_resumes_the_server(plugin: Plugin) -> None:
    """The rank loop releases the lock when all ranks have agreed that the step failed."""
    lock = attach(plugin, options(SyncMode.step_lock))
    gate = UpdateGate(SyncMode.step_lock, TPGroup.single(), torch.device("cpu"), lock)

    def step(samples: object, *_: object) -> None:
        gate.before_write()
        assert plugin.vllm.paused
        raise ValueError("injected in the optimizer")

    trainer = SimpleNamespace(
        step=step, mesh=Mesh.single(TPGroup.single()), weight_version=7, device=torch.device("cpu"),
        peak_memory_bytes=lambda: 0, abandon_step=lambda: None, rejoin=lambda: None,
        optimizer=SimpleNamespace(progress=lambda: (0, 0)),
    )  # fmt: skip
    services = RecordingServices(finish_command=gate.after_step)
    loop = RankLoop(trainer, services, Control(0, 1), None)  # type: ignore[arg-type]
    reply = loop.execute(commands.Step(id="j/1", job_id="j", job_step=1, samples=[]))
    assert isinstance(reply, commands.CommandFailed)
    assert "injected" in reply.message
    assert plugin.vllm.calls == ["no salt", "keep", "resume"]
    lock.close()


def test_a_pause_of_somebody_else_is_left_to_them(plugin: Plugin) -> None:
    """vLLM was paused through its own /pause: the update may be written, and the pause stays."""
    plugin.vllm.paused = True
    lock = attach(plugin, options(SyncMode.drain))
    lock.pause()
    lock.release(8)
    assert plugin.vllm.paused
    assert plugin.vllm.calls == ["no salt"]
    lock.close()


@pytest.mark.parametrize("stays", [True, False])
def test_a_drain_of_somebody_else_is_waited_for(plugin: Plugin, stays: bool) -> None:
    """vLLM calls itself paused as soon as it is asked, while requests still run: nothing may be written yet. It goes on when
    the client of their /pause has gone away."""
    plugin.vllm.busy = True
    theirs = plugin.others("pause_generation", mode="wait", clear_cache=True)
    if not stays:
        theirs.cancel()
        plugin.run_ready()
    lock = attach(plugin, options(SyncMode.step_lock, timeout_seconds=0.3))
    with pytest.raises(DeadlineError):
        lock.pause()
    lock.release(7)
    plugin.vllm.busy = False
    if stays:
        theirs.result(5)
    lock.pause()
    lock.release(8)
    assert plugin.vllm.calls == ["wait", "no salt"]
    assert plugin.vllm.paused
    plugin.others("resume_generation").result(5)
    lock.close()


def test_a_drain_that_somebody_else_ended_is_not_waited_for(plugin: Plugin) -> None:
    """With /resume, though vLLM answers their /pause once nothing runs."""
    plugin.vllm.busy = True
    plugin.others("pause_generation", mode="wait", clear_cache=True)
    plugin.others("resume_generation").result(5)
    lock = attach(plugin, options(SyncMode.step_lock))
    lock.pause()
    lock.release(8)
    assert plugin.vllm.calls == ["wait", "resume", "no salt", "keep", "resume"]
    lock.close()


def test_what_others_ask_for_during_a_pause_comes_after_it(plugin: Plugin) -> None:
    """Their /resume does not let requests run under a write, and their /pause outlives ours."""
    lock = attach(plugin, options(SyncMode.step_lock))
    lock.pause()
    resumed = plugin.others("resume_generation")
    paused = plugin.others("pause_generation", mode="abort", clear_cache=True)
    assert plugin.vllm.calls == ["no salt", "keep"]
    lock.release(8)
    resumed.result(5), paused.result(5)
    assert plugin.vllm.calls == ["no salt", "keep", "resume", "resume", "abort"]
    assert plugin.vllm.paused
    lock.close()
