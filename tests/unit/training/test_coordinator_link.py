"""Rank 0's connection to the coordinator: heartbeats, commands and replies over a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from apollo_tp.errors import DeadlineError
from apollo_tp.training import coordinator_link
from apollo_tp.training.coordinator_link import Link
from apollo_tp.wire import codec, commands

SECONDS = 10


class Coordinator:
    """The coordinator's end: a ROUTER socket."""

    def __init__(self, path: Path) -> None:
        self.address, self._context, self._peer = f"ipc://{path}", zmq.Context(), b""
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address)

    def next(self, *, heartbeats: bool = False) -> Any:
        """The next reply, without heartbeats unless they are asked for."""
        while True:
            assert self._socket.poll(1000 * SECONDS), "nothing came"
            self._peer, frame = self._socket.recv_multipart()
            reply = codec.decode(frame, commands.AnyReply)
            if heartbeats or not isinstance(reply, commands.Heartbeat):
                return reply

    def send(self, command: commands.AnyCommand) -> None:
        self._socket.send_multipart([self._peer, codec.encode(command)])

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setattr(coordinator_link, "HEARTBEAT_SECONDS", 0.05)
    coordinator = Coordinator(tmp_path / "ranks.sock")
    yield coordinator
    coordinator.close()


def test_heartbeats_say_what_the_ranks_work_on(coordinator: Coordinator) -> None:
    """By which the coordinator knows that a step lasts, and that an idle trainer lives."""
    link = Link(coordinator.address, lambda: None)
    for state in (("", 0), ("j/3", 7), ("", 8)):
        link.working_on(*state)
        beats = [coordinator.next(heartbeats=True) for _ in range(3)]  # of which the first may have been on its way
        assert beats[-1] == commands.Heartbeat(busy_with=state[0], weight_version=state[1])
    link.close(commands.Goodbye(reason="done"))


def test_commands_and_replies_keep_their_order(coordinator: Coordinator) -> None:
    """Several of each may be on their way, many when the ranks leave; the reason why they do is the last message."""
    link = Link(coordinator.address, lambda: None)
    first = commands.ScoreDone(id="first", logprobs=[], weights=[], num_correct=[])
    link.send(first)
    assert coordinator.next() == first
    sent = [commands.SaveCheckpoint(id=f"save/{i}", name="x") for i in range(5)]
    for command in sent:
        coordinator.send(command)
    assert [codec.decode(link.receive(SECONDS), commands.AnyCommand) for _ in sent] == sent
    assert link.receive(0.0) == b""
    last = [commands.ScoreDone(id=f"{i}", logprobs=[], weights=[], num_correct=[]) for i in range(200)]
    for reply in last:
        link.send(reply)
    link.close(commands.Goodbye(reason="got SIGTERM", failed=True))
    assert [coordinator.next() for _ in last] == last
    assert coordinator.next() == commands.Goodbye(reason="got SIGTERM", failed=True)


def test_a_thread_that_was_not_scheduled_loses_nothing(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent, and the end, after the thread has last looked and before it goes on, as on a host under load."""
    looked, go_on = threading.Event(), threading.Event()

    class Poller(zmq.Poller):  # type: ignore[type-arg]
        def poll(self, timeout: float | None = None) -> list[tuple[Any, int]]:
            ready = super().poll(timeout)
            if not ready:
                looked.set()
                go_on.wait(SECONDS)
            return ready

    monkeypatch.setattr(coordinator_link.zmq, "Poller", Poller)
    link = Link(coordinator.address, lambda: None)
    assert looked.wait(SECONDS)
    link.send(commands.ScoreDone(id="last", logprobs=[], weights=[], num_correct=[]))
    threading.Timer(0.5, go_on.set).start()
    link.close(commands.Goodbye(reason="done"))
    assert coordinator.next() == commands.ScoreDone(id="last", logprobs=[], weights=[], num_correct=[])
    assert coordinator.next() == commands.Goodbye(reason="done")


def test_a_coordinator_that_cannot_be_kept_running_ends_the_wait(coordinator: Coordinator) -> None:
    """``alive`` is asked before each wait, and its error is the rank's."""

    def alive() -> None:
        raise DeadlineError("it ended three times")

    link = Link(coordinator.address, alive)
    with pytest.raises(DeadlineError, match="it ended three times"):
        link.receive(SECONDS)
    link.close(commands.Goodbye(reason="done"))
