"""A rank that failed wakes the others: real processes, one memory, and a group whose ``abort`` is recorded."""

from __future__ import annotations

import datetime
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from apollo_tp.distributed import alarm as module
from apollo_tp.distributed import remote_ranks, tp_group
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.peer_memory import PeerSums
from apollo_tp.distributed.remote_ranks import SILENT_SECONDS, RemoteRanks
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import DeadlineError
from apollo_tp.runtime import processes
from apollo_tp.runtime.processes import ProcessId
from tests.support.locked_server import eventually
from tests.support.processes import free_port
from tests.support.ranks import run_ranks


def _check_alarm(tp: TPGroup) -> None:
    alarm = Alarm.join(Control(tp.rank, tp.size))
    assert not alarm.is_ringing()
    assert alarm.all_run()
    dist.barrier()
    if tp.rank == 1:
        alarm.ring()
    dist.barrier()
    assert alarm.is_ringing(), "every rank hears it"
    if tp.rank == 0:
        alarm.next_epoch()
        assert not alarm.is_ringing(), "of a failure that is over, whatever the other rank has done about it by now"
    dist.barrier()
    alarm._epoch = 2
    if tp.rank == 1:
        alarm.ring()
    dist.barrier()
    assert alarm.is_ringing()


def test_all_ranks_hear_it_and_forget_it_with_the_group() -> None:
    run_ranks(_check_alarm, 2)


def _hear_other_hosts(tp: TPGroup, port: int) -> str:
    """Ranks of one machine each, as they are told. Rank 0 waits in a group; the end of rank 1 is not seen otherwise."""
    module.POLL_SECONDS, module.GRACE_SECONDS, remote_ranks.SILENT_SECONDS = 0.02, 0.1, 1.0
    processes.machine = lambda: f"machine {tp.rank}"
    store = dist.TCPStore("127.0.0.1", port, tp.size, is_master=tp.rank == 0, wait_for_workers=False)
    alarm = Alarm.join(Control(tp.rank, tp.size), dist.PrefixStore("p", store))
    waiting = Waiting()
    alarm.watch(waiting)
    dist.barrier()
    time.sleep(0.3)
    assert (alarm.is_ringing(), alarm.all_run(), waiting.aborted) == (False, True, [])
    dist.barrier()
    if tp.rank == 1:
        alarm.ring()
    eventually(lambda: waiting.aborted)
    dist.barrier()
    alarm.next_epoch()
    waiting.group = "second"
    time.sleep(0.3)
    assert (alarm.is_ringing(), waiting.aborted) == (False, ["first"])
    dist.barrier()
    if tp.rank == 1:
        alarm.stop()  # no sign of it any more, as after a loss of power
        return "silent"
    eventually(lambda: len(waiting.aborted) == 2)
    assert not alarm.is_ringing()
    alarm.stop()
    return "heard"


def test_ranks_on_other_hosts_hear_it_too() -> None:
    """Through the store: a failure at once, and silence after a while."""
    assert run_ranks(_hear_other_hosts, 2, free_port()) == ["heard", "silent"]


def test_ranks_whose_store_has_ended_count_as_ended() -> None:
    """It ends with the launcher of rank 0."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    far = dist.TCPStore("127.0.0.1", store.port, 2, is_master=False, wait_for_workers=False)
    near, other = RemoteRanks(store, 0, [1]), RemoteRanks(far, 1, [0])
    assert near.exchange(3) == {1: 0}
    assert other.exchange(0) == {0: 3}
    assert other.all_run()
    del near, store
    gc.collect()
    assert other.exchange(0) == {}
    assert not other.all_run()


def test_a_rank_leaves_when_those_of_another_host_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is idle; with the reason. Not before they have had time to end by themselves."""
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.5)
    gone = [0.0]
    remote = SimpleNamespace(exchange=lambda failed: {}, all_run=lambda: not gone[0], gone_seconds=lambda: gone[0])
    alarm, tp, left = _alarm([ME]), Waiting(), []
    alarm._remote, alarm.on_lost, tp.group = remote, left.append, None  # type: ignore[assignment]
    alarm.watch(tp)
    gone[0] = 0.4
    time.sleep(0.3)
    assert not left
    gone[0] = 0.6
    eventually(lambda: left)
    alarm.stop()
    assert "rank 0: got no sign of ranks on another host" in str(left[0])


def test_a_store_that_is_out_of_reach_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is not closed, and no answer comes, not even to the message that ends a wait. It may come back."""
    monkeypatch.setattr(remote_ranks, "STORE_SECONDS", 0.5)
    code = (
        "import torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, 2, is_master=True, wait_for_workers=False)\n"
        "store.set('alarm/0', '0 0')\n"
        "print(store.port, flush=True)\n"
        "input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        ranks = RemoteRanks(dist.TCPStore("127.0.0.1", port, 2, is_master=False, wait_for_workers=False), 1, [0])
        try:
            assert ranks.exchange(0) == {0: 0}
            process.send_signal(signal.SIGSTOP)
            status = Path(f"/proc/{process.pid}/status")
            eventually(lambda: "State:\tT" in status.read_text())
            started = time.monotonic()
            assert ranks.exchange(0) == {}
            assert ranks.exchange(0) == {}
            assert time.monotonic() - started < 5
            assert not ranks.all_run()
            process.send_signal(signal.SIGCONT)
            eventually(lambda: ranks.exchange(0) == {0: 0})
            assert ranks.all_run()
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def test_silence_is_counted_from_when_it_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may be slow; a store that does not answer is gone at once."""
    now = [100.0]
    monkeypatch.setattr(remote_ranks.time, "monotonic", lambda: now[0])
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    near, far = RemoteRanks(store, 0, [1]), RemoteRanks(store, 1, [0])
    near.exchange(0)
    now[0] += SILENT_SECONDS
    assert near.gone_seconds() == 0
    now[0] += 3
    assert near.gone_seconds() == 3
    far.exchange(0)
    near.exchange(0)
    assert near.gone_seconds() == 0
    del store, near._store
    gc.collect()
    far.exchange(0)
    now[0] += 2
    assert far.gone_seconds() == 2


class Waiting(TPGroup):
    """A group in which this rank waits; it notes when it is aborted."""

    def __init__(self) -> None:
        super().__init__(0, 2, group="first")  # type: ignore[arg-type]
        self.aborted: list[object] = []

    def abort(self) -> None:
        self.aborted.append(self.group)


def _alarm(ranks: list[ProcessId]) -> Alarm:
    module.POLL_SECONDS, module.GRACE_SECONDS = 0.02, 0.3
    return Alarm(0, ranks, bytearray(8))


ME = ProcessId.of(os.getpid())
assert ME is not None


def _watch(alarm: Alarm, seconds: float, fail: bool = True, leave: bool = False) -> list[object]:
    """The groups that were aborted within some time."""
    tp = Waiting()
    alarm.watch(tp)
    if fail:
        alarm._failed[1] = 1
    if leave:
        time.sleep(0.1)
        tp.group = None  # dissolved, by the main thread
    time.sleep(seconds)
    alarm.stop()
    return tp.aborted


def test_a_rank_that_still_waits_when_another_failed_is_woken_once() -> None:
    started = time.monotonic()
    tp, alarm = Waiting(), _alarm([ME, ME])
    alarm.watch(tp)
    alarm._failed[1] = 1
    assert eventually(lambda: tp.aborted) >= 0.25, "ranks have some time to notice by themselves"
    time.sleep(0.5)
    alarm.stop()
    assert tp.aborted == ["first"]
    assert time.monotonic() - started < 5


def test_a_dead_rank_is_not_waited_for() -> None:
    assert _watch(_alarm([ME, ProcessId(2**22 + 1, 0)]), 1.0, fail=False) == ["first"]


def test_a_rank_that_left_the_group_by_itself_is_left_alone() -> None:
    assert _watch(_alarm([ME, ME]), 1.0, leave=True) == []
    assert _watch(_alarm([ME, ME]), 1.0, fail=False) == []


def _leave(tp: TPGroup) -> bool:
    """Rank 1 leaves the group, as after an error; whether the other has heard it."""
    alarm = Alarm.join(Control(tp.rank, tp.size))
    tp.on_leave = alarm.ring
    dist.barrier()
    if tp.rank == 1:
        tp.dissolve()
    else:
        eventually(alarm.is_ringing)
    return alarm.is_ringing()


def test_who_leaves_the_group_rings() -> None:
    assert run_ranks(_leave, 2) == [True, True]


def test_a_device_that_does_not_come_to_rest_is_not_waited_for() -> None:
    """A stand-in for the device, which waits for ever: the wait ends with an error all the same."""
    forever = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 3)
        patch.setattr(torch.cuda, "synchronize", lambda device: forever.wait())
        patch.setattr(tp_group, "DEVICE_SECONDS", 0.2)
        with pytest.raises(DeadlineError, match="GPU 3 still busy 0 s after"):
            TPGroup.single().dissolve()
        forever.set()
        TPGroup.single().dissolve()


class Graphs:
    """In place of NCCL's communicator and of the graphs that captured its collectives: its abort waits for their end."""

    def __init__(self) -> None:
        self.dropped, self.aborting = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.aborting.set()
        self.dropped.wait(10)

    def drop(self) -> None:
        assert self.aborting.wait(5), "the device wakes before the graphs are dropped"
        self.dropped.set()


@pytest.mark.parametrize("dropped", [True, False])
def test_a_group_whose_collectives_were_captured_is_left(dropped: bool) -> None:
    """NCCL's abort returns once the graphs are gone; where that does not happen, the process must end."""
    graphs, tp = Graphs(), TPGroup(0, 2)
    tp.group = graphs  # type: ignore[assignment]
    if dropped:
        tp.call_before_dissolve(graphs.drop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "nccl")
        patch.setattr(dist, "destroy_process_group", lambda group: None)
        patch.setattr(tp_group, "DEVICE_SECONDS", 5.0 if dropped else 0.2)
        if dropped:
            tp.dissolve()
            assert tp.group is None
        else:
            with pytest.raises(DeadlineError, match="communicators still open"):
                tp.dissolve()
    graphs.dropped.set()


def test_buffers_of_sums_are_made_when_a_group_is_formed_again() -> None:
    """With the next sum, a rank would wait on the host for one that fails before it. Buffers that nobody reserved are not
    made."""
    made: list[int] = []
    for reserved in (0, 4096):
        tp = TPGroup(0, 2, peers=PeerSums(min_buffer_bytes=reserved))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "new_group", lambda ranks, **options: "group")
            patch.setattr(dist, "get_rank", lambda: 0)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(PeerSums, "buffers_for", lambda *arguments: made.append(arguments[-1]))
            tp.form("nccl", datetime.timedelta(seconds=1))
        assert made == ([reserved] if reserved else [])
