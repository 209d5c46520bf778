"""Rank 0's child process: the coordinator. It has no torch and no model, so it answers clients while the ranks compute."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from apollo_tp.config import Config
from apollo_tp.coordinator.settings import EXIT_STORAGE, Begin, Order, Settings, WaitHere, WaitingFor
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import instance_folder, private_files
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.serving import Serving, read_serving

STOP_SECONDS = 10.0
MAX_REASON_BYTES = 4096
REPORT_SECONDS = 15.0
"""The longest silence in the log while something is waited for."""
MIN_LIFE_SECONDS = 10.0
"""A coordinator that ends by itself sooner is not started again: it would fail again, for example on a port in use."""
PAUSE_SECONDS = 5.0
"""The wait before a coordinator that ended on a full disk is started again. Jobs wait meanwhile, and continue then."""

log = logging.getLogger("apollo_tp")


class CoordinatorProcess:
    """Starts ``python -m apollo_tp.coordinator`` at once: it says what is waited for (``waiting``) until the server is ready
    (``begin``), for which its settings are in a 0600 file of the instance's folder. ``base`` is the base of the runtime
    folder."""

    def __init__(self, config: Config, base: Path) -> None:
        self._config = config
        self._settings_path: Path | None = None
        self._has_lived = False
        self._reason, self._reported_at = "", -math.inf
        self._base = base
        self._start()

    def waiting(self, reason: str) -> None:
        """Say what is waited for, on its port and in the log: when it changes, and every REPORT_SECONDS. Raises ConfigError
        as ``check``."""
        self.check()
        now = time.monotonic()
        if reason == self._reason and now - self._reported_at < REPORT_SECONDS:
            return
        if reason != self._reason:
            self._order(WaitingFor(reason))
        self._reason, self._reported_at = reason, now
        log.info("%s", reason)

    def begin(self, folder: Path, manifest: Manifest) -> None:
        """The server of ``folder`` is ready: take requests for it. Raises ConfigError as ``check``."""
        config = self._config
        settings = Settings(
            service=config.service,
            capture=config.capture,
            learn=config.learn,
            instance_dir=str(folder),
            model_path=manifest.model_path if Path(manifest.model_path).is_dir() else "",
            serving=read_serving(folder) or Serving(),
            max_sequence_tokens=config.train.max_sequence_tokens,
            max_skipped_steps=config.optim.max_skipped_steps,
            rl=config.rl,
            command_timeout_seconds=config.command_timeout_seconds,
            checkpoint_after_idle_seconds=config.checkpoint.after_idle_seconds,
            parent_pid=os.getpid(),
        )
        self._settings_path = folder / instance_folder.SETTINGS_FILE
        private_files.write_private(self._settings_path, msgspec.json.encode(settings))
        self.check()
        self._order(Begin(str(self._settings_path)))
        self._started_at, self._has_lived = time.monotonic(), False  # what follows may fail on other grounds

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._reason_fd = os.memfd_create("reason")
        command = [sys.executable, "-m", "apollo_tp.coordinator", "--reason-fd", str(self._reason_fd)]
        if self._settings_path is not None:
            command += ["--config", str(self._settings_path)]
        # A session of its own, so that Ctrl-C reaches only the ranks, which then stop it in order.
        self._process = subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.PIPE, pass_fds=[self._reason_fd]
        )
        if self._settings_path is None:
            self._order(WaitHere(self._config.service, str(self._base)))
            self._order(WaitingFor(self._reason or "the trainer starts"))

    def _order(self, order: Order) -> None:
        """Send an order. One that has ended, or that began already, does not read it; ``check`` sees to the former."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()

    def check(self) -> None:
        """Start it again if it ended: jobs are durable, and it asks the ranks for the last completed step.

        Raises ConfigError if it ended by itself soon after its start; the log lines above tell why. A disk that has become
        full since the first start is not counted as such.
        """
        status, age = self._process.poll(), time.monotonic() - self._started_at
        self._has_lived |= age >= MIN_LIFE_SECONDS
        if status is None:
            return
        full = status == EXIT_STORAGE and self._has_lived
        if full and age < PAUSE_SECONDS:
            return
        # by an operator or for lack of memory, so its settings are not at fault; 0: it was asked to end and did
        killed = status in (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
        if not (killed or full) and age < MIN_LIFE_SECONDS:
            reason = os.pread(self._reason_fd, MAX_REASON_BYTES, 0).decode() or "see its log lines"
            raise ConfigError(f"coordinator: got exit status {status} at its start, expected it to run: {reason}")
        log.error("the coordinator ended with status %d; starting it again", status)
        os.close(self._reason_fd)
        self._start()

    def stop(self) -> None:
        """Ask it to end, and wait; kill it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
