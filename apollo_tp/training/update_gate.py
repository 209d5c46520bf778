"""The trainer's side of the update lock: rank 0 lets vLLM pause before an update, and resume after it.

All ranks call ``before_write`` between the backward pass and the update, and ``after_step`` at the end of the command.
The server's side, and what happens when this process dies: ``vllm_plugin/update_lock.py``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from pathlib import Path

import torch

from apollo_tp.config import CacheMode, SyncConfig, SyncMode
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, DeadlineError, FrameError, ServerGoneError
from apollo_tp.runtime import instance_folder
from apollo_tp.wire import codec
from apollo_tp.wire import update_lock as lock_messages

log = logging.getLogger("apollo_tp")

ANSWER_SECONDS = 30.0
"""Deadline of answers that do not depend on running requests: attaching, and refreshing the prefix cache."""
FAILURE_SECONDS = 30.0
"""How long the pause is kept after a rank has failed: until then all ranks have stopped to write, or end."""


class Lock:
    """Rank 0's connection to the plugin. While the server is paused, a thread renews the lease: as long as all ranks run,
    for FAILURE_SECONDS after ``alarm`` rang, and not for longer than ``sync.max_pause_seconds``, after which it rings.

    Raises ConfigError if the server does not answer or refuses.
    """

    def __init__(self, folder: Path, config: SyncConfig, weight_version: int, alarm: Alarm) -> None:
        self._timeout, self._max_pause, self._alarm = config.timeout_seconds, config.max_pause_seconds, alarm
        self._patience = 1.0
        self._paused_at = 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_SECONDS)
        self._sending = threading.Lock()
        self._holding = threading.Event()
        self._broken = ""
        try:
            self._socket.connect(str(instance_folder.socket_path(folder, instance_folder.SYNC_SOCKET)))
            self._send(lock_messages.SyncAttach(config.mode.value, config.cache.value, weight_version))
            error = self._answer("SyncAttach", ANSWER_SECONDS)
        except (OSError, DeadlineError) as caught:
            error = f"the plugin in its API server does not answer ({caught}); start vLLM with VLLM_PLUGINS=apollo"
        if error:
            self._socket.close()
            raise ConfigError(
                f"sync={config.mode.value} cache={config.cache.value}: server {folder.name}: {error}, or train with "
                "sync=hogwild cache=none"
            )
        threading.Thread(target=self._renew, name="update-lock", daemon=True).start()

    def pause(self, patience: float = 1.0) -> None:
        """Pause the server; returns when nothing runs on it any more. ``patience`` multiplies how long it may stay paused.
        Raises ServerGoneError or DeadlineError."""
        self._patience = patience
        if self._broken:
            raise ServerGoneError(f"the update lock is lost ({self._broken}); restart server and trainer")
        self._paused_at = math.inf
        self._holding.set()
        self._send(lock_messages.SyncPause())
        error = self._answer("SyncPause", self._timeout)
        self._paused_at = time.monotonic()
        if error:
            raise ServerGoneError(f"got {error}, expected a paused server; look at the server's log")

    def release(self, weight_version: int) -> None:
        """Resume the server after an update that has ended or failed on all ranks. Problems are logged, not raised: the
        weights are written by now."""
        self._holding.clear()
        try:
            self._send(lock_messages.SyncRelease(weight_version))
            error = self._answer("SyncRelease", ANSWER_SECONDS)
        except (OSError, ServerGoneError, DeadlineError) as caught:
            error = self._broken = str(caught)
        if error:
            log.error("weight version %d: %s", weight_version, error)

    def close(self) -> None:
        """Leave; the server resumes if it is paused."""
        self._holding.clear()
        self._socket.close()

    def _renew(self) -> None:
        rings_since = math.inf
        while self._holding.wait():
            if self._socket.fileno() < 0 or not self._alarm.all_run():
                return  # so that the lease runs out: a rank that waits for a dead one may wait long
            now = time.monotonic()
            if now - self._paused_at > self._patience * self._max_pause and not self._alarm.is_ringing():
                log.error(
                    "the server is paused for %.0f s (sync.max_pause_seconds): the write is given up",
                    now - self._paused_at,
                )
                self._alarm.ring()
            rings_since = min(rings_since, now) if self._alarm.is_ringing() else math.inf
            if now - rings_since <= FAILURE_SECONDS:
                with contextlib.suppress(OSError):  # the reader of the next answer reports it
                    self._send(lock_messages.SyncRenew())
            time.sleep(lock_messages.SYNC_RENEW_SECONDS)

    def _send(self, message: lock_messages.SyncRequest) -> None:
        with self._sending:
            self._socket.sendall(lock_messages.frame(message))

    def _answer(self, kind: str, seconds: float) -> str:
        """The error text of the answer to request ``kind`` ("" if there is none); late answers to other requests are
        skipped."""
        deadline = time.monotonic() + seconds
        while True:
            size = int.from_bytes(self._read(4, kind, deadline, seconds), "big")
            try:
                if size > lock_messages.MAX_SYNC_FRAME_BYTES:
                    raise FrameError(f"got {size} bytes, expected at most {lock_messages.MAX_SYNC_FRAME_BYTES}")
                answer = codec.decode(self._read(size, kind, deadline, seconds), lock_messages.SyncAnswer)
            except FrameError as error:
                raise ServerGoneError(f"{kind}: got no answer that can be read: {error}; restart the server") from error
            if answer.kind == kind:
                return str(answer.error)

    def _read(self, size: int, kind: str, deadline: float, seconds: float) -> bytes:
        content = b""
        while len(content) < size:
            left = deadline - time.monotonic()
            try:
                self._socket.settimeout(max(left, 0.001))
                part = self._socket.recv(size - len(content))
            except TimeoutError:
                raise DeadlineError(
                    f"{kind}: got no answer of the server for {seconds:.0f} s, expected one; if requests run for longer, "
                    "raise sync.timeout_seconds, or use sync=step_lock"
                ) from None
            if not part:
                raise ServerGoneError("the server closed the update lock's connection; look at its log")
            content += part
        return content


class UpdateGate:
    """What the ranks do around an update. ``lock`` is rank 0's; it is None on the other ranks, and everywhere if updates
    neither pause the server nor refresh its prefix cache."""

    def __init__(self, mode: SyncMode, tp: TPGroup, device: torch.device, lock: Lock | None) -> None:
        self._mode, self._control, self._lock = mode, ComputeControl(tp, device), lock
        self._open = False
        self._paused_at: float | None = None

    @property
    def pauses(self) -> bool:
        """Whether the server is paused while an update is written."""
        return self._mode is not SyncMode.hogwild

    def before_write(self, patience: float = 1.0) -> None:
        """Returns when the server is paused, if the mode says so; for at most ``patience`` times sync.max_pause_seconds.

        Collective where the mode pauses: two all-gathers over the compute group, each of which also waits for the device.
        Raises on all ranks if the server could not be paused.
        """
        self._open, self._paused_at = True, None
        if not self.pauses:
            return
        with self._control.agree():
            pass  # the server runs until the slowest rank has its gradients
        with self._control.agree():
            if self._lock:
                self._lock.pause(patience)
            self._paused_at = time.monotonic()

    def after_step(self, weight_version: int) -> float:
        """Resume the server. Call it when all ranks are known to have written or failed.

        Returns for how many seconds the server was paused, without the wait until it was. Local.
        """
        if not self._open:
            return 0.0
        self._open = False
        if self._lock:
            self._lock.release(weight_version)
        return time.monotonic() - self._paused_at if self._paused_at else 0.0


def needs_lock(config: SyncConfig) -> bool:
    """Whether updates need the server's cooperation; they do not by default."""
    return config.mode is not SyncMode.hogwild or config.cache is not CacheMode.none
