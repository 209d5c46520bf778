"""Rank 0's connection to the coordinator, with heartbeats sent by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

from apollo_tp.wire import codec, commands

HEARTBEAT_SECONDS = 1.0


class Link:
    """Rank 0's DEALER to the coordinator at ``address``. A thread sends heartbeats also while the ranks are busy.

    A ZMQ socket belongs to one thread: that thread owns the DEALER, and exchanges frames with the others through a pair of
    inproc sockets. ``alive`` is called before each ``receive``; it raises if the coordinator cannot be kept running.
    """

    def __init__(self, address: str, alive: Callable[[], None]) -> None:
        self._alive = alive
        self._context = zmq.Context()
        self._pair = self._context.socket(zmq.PAIR)
        self._pair.bind("inproc://link")
        self._state = ("", 0)
        self._thread = threading.Thread(target=self._relay, args=(address,), name="coordinator-link", daemon=True)
        self._thread.start()

    def send(self, reply: commands.AnyReply) -> None:
        """Queue a reply for the coordinator."""
        self._pair.send(codec.encode(reply))

    def receive(self, timeout_seconds: float) -> bytes:
        """The next command's frame, or b"" after ``timeout_seconds``. Raises what ``alive`` raises."""
        self._alive()
        return self._pair.recv() if self._pair.poll(int(timeout_seconds * 1000)) else b""

    def working_on(self, command_id: str, weight_version: int) -> None:
        """Set what heartbeats report from now on: the command being executed ("" when idle), and the weight version."""
        self._state = (command_id, weight_version)

    def close(self, goodbye: commands.Goodbye) -> None:
        """Send why the ranks leave, and end the thread once it has passed on all that was sent before."""
        self.send(goodbye)
        self._pair.send(b"")
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
                frame = pair.recv()
                if not frame:  # of close(): in order with what was sent before, as a flag would not be
                    break
                dealer.send(frame)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                with suppress(zmq.Again):  # the coordinator is gone or slow: heartbeats may be lost
                    busy, version = self._state
                    dealer.send(codec.encode(commands.Heartbeat(weight_version=version, busy_with=busy)), zmq.NOBLOCK)
        dealer.close()
        pair.close(0)
