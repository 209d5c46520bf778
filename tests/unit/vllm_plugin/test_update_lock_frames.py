"""What strangers, another release or a stopped peer may send over the update lock: server and trainer go on."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from apollo_tp.config import SyncMode
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.errors import ServerGoneError
from apollo_tp.runtime import instance_folder
from apollo_tp.training.update_gate import Lock
from apollo_tp.wire import update_lock as lock_messages
from tests.support.frames import NOT_UTF8
from tests.support.locked_server import Plugin, attach, eventually, options

NESTED = b"\x82\xa4type\xa9SyncRenew\xa1x" + b"\x91" * 50_000


def raw(plugin: Plugin) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    connection.connect(str(plugin.folder / instance_folder.SYNC_SOCKET))
    return connection


def attached(plugin: Plugin) -> socket.socket:
    connection = raw(plugin)
    connection.sendall(lock_messages.frame(lock_messages.SyncAttach("step_lock", "none", 7)))
    assert connection.recv(1000)
    return connection


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (
            lock_messages.frame(lock_messages.SyncAttach("step_lock", "none", 7)),
            "got SyncAttach, expected it once",
        ),
        (
            (lock_messages.MAX_SYNC_FRAME_BYTES + 1).to_bytes(4, "big"),
            f"got a frame of {lock_messages.MAX_SYNC_FRAME_BYTES + 1} bytes",
        ),
        ((3).to_bytes(4, "big") + b"abc", "the update lock's connection is closed"),
        ((12).to_bytes(4, "big") + NOT_UTF8, "the update lock's connection is closed"),
        (len(NESTED).to_bytes(4, "big") + NESTED, "maximum recursion depth"),
        (lock_messages.frame(lock_messages.SyncPause()), "the server is paused already"),
    ],
    ids=["attach", "long", "garbage", "not UTF-8", "nested", "pause"],
)
def test_what_nobody_should_send_ends_the_connection_and_the_pause(
    plugin: Plugin, frame: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another release, say. The place of the one trainer is free again."""
    connection = attached(plugin)
    connection.sendall(lock_messages.frame(lock_messages.SyncPause()))
    assert connection.recv(1000)
    assert plugin.vllm.paused
    connection.sendall(frame)
    assert connection.recv(1000) == b""
    assert reason in caplog.text
    eventually(lambda: not plugin.vllm.paused and plugin.lock._attached is None)
    assert plugin.vllm.calls == ["no salt", "keep", "resume"]
    attach(plugin, options(SyncMode.step_lock)).close()


@pytest.mark.parametrize(
    "frame",
    [
        lock_messages.frame(lock_messages.SyncPause()),
        lock_messages.frame(lock_messages.SyncAttach("backwards", "none", 7)),
        lock_messages.frame(lock_messages.SyncAttach("drain", "some", 7)),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
    ids=["pause", "mode", "cache", "http", "nothing"],
)
def test_strangers_are_hung_up_on_before_the_server_is_touched(plugin: Plugin, frame: bytes) -> None:
    """And leave the trainer that is attached alone."""
    lock = attach(plugin, options(SyncMode.step_lock))
    connection = raw(plugin)
    connection.sendall(frame)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1000) == b""
    lock.pause()
    assert plugin.vllm.calls == ["no salt", "keep"]
    lock.release(8)
    lock.close()


def test_a_trainer_that_takes_no_answer_does_not_hold_the_server(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its renewals fill what nobody reads: stopped by a debugger, say, between them and the answers."""
    monkeypatch.setattr("apollo_tp.vllm_plugin.update_lock.WRITE_SECONDS", 0.2)
    connection = attached(plugin)
    # more answers than the socket's buffers hold
    pair = lock_messages.frame(lock_messages.SyncPause()) + lock_messages.frame(lock_messages.SyncRelease(8))

    def send() -> None:
        with contextlib.suppress(OSError):
            for _ in range(20_000):
                connection.sendall(pair)

    sender = threading.Thread(target=send)
    sender.start()
    eventually(lambda: plugin.lock._attached is None)
    assert not plugin.vllm.paused
    sender.join(2)
    assert not sender.is_alive(), "its connection is still open"


@pytest.mark.parametrize(
    "answer",
    [
        len(NOT_UTF8).to_bytes(4, "big") + NOT_UTF8,
        len(NESTED).to_bytes(4, "big") + NESTED,
        (2**31).to_bytes(4, "big"),
        lock_messages.frame(lock_messages.SyncPause()),
        b"\0\0\0\0",
    ],
    ids=["not UTF-8", "nested", "2 GB", "a request", "empty"],
)
def test_an_answer_that_is_none_ends_the_lock_not_the_rank(
    answer: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another release, say. After an update it is logged; the next step fails, with what to do."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as server:
        server.bind(str(tmp_path / instance_folder.SYNC_SOCKET))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for reply in (lock_messages.frame(lock_messages.SyncAnswer("SyncAttach")), answer):
                    connection.recv(1000)
                    connection.sendall(reply)
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        lock = Lock(tmp_path, options(SyncMode.step_lock), 7, Alarm(0, [], bytearray(4)))
        lock.release(8)
        assert "weight version 8: SyncRelease: got no answer that can be read" in caplog.text
        with pytest.raises(ServerGoneError, match=r"the update lock is lost .*; restart server and trainer"):
            lock.pause()
        lock.close()
        thread.join(5)
