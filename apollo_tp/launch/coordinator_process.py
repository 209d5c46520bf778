"""Rank 0's child process: the coordinator. It has no torch and no model, so it answers clients while the ranks compute."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from apollo_tp.config import Config
from apollo_tp.coordinator.settings import EXIT_STORAGE, Settings
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import instance_folder, private_files
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.serving import Serving, read_serving

STOP_SECONDS = 10.0
MIN_LIFE_SECONDS = 10.0
"""A coordinator that ends by itself sooner is not started again: it would fail again, for example on a port in use."""
PAUSE_SECONDS = 5.0
"""The wait before a coordinator that ended on a full disk is started again. Jobs wait meanwhile, and continue then."""

log = logging.getLogger("apollo_tp")


class CoordinatorProcess:
    """Starts ``python -m apollo_tp.coordinator`` with its settings in a 0600 file of the instance's folder."""

    def __init__(self, config: Config, folder: Path, manifest: Manifest) -> None:
        settings = Settings(
            service=config.service,
            instance_dir=str(folder),
            model_path=manifest.model_path if Path(manifest.model_path).is_dir() else "",
            serving=read_serving(folder) or Serving(),
            max_sequence_tokens=config.train.max_sequence_tokens,
            max_skipped_steps=config.optim.max_skipped_steps,
            command_timeout_seconds=config.command_timeout_seconds,
            checkpoint_after_idle_seconds=config.checkpoint.after_idle_seconds,
            parent_pid=os.getpid(),
        )
        self._settings_path = folder / instance_folder.SETTINGS_FILE
        private_files.write_private(self._settings_path, msgspec.json.encode(settings))
        self._has_lived = False
        self._start()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        # A session of its own, so that Ctrl-C reaches only the ranks, which then stop it in order.
        command = [sys.executable, "-m", "apollo_tp.coordinator", "--config", str(self._settings_path)]
        self._process = subprocess.Popen(command, start_new_session=True)

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
            raise ConfigError(
                f"coordinator: got exit status {status} at its start, expected it to run; see its log lines"
            )
        log.error("the coordinator ended with status %d; starting it again", status)
        self._start()

    def stop(self) -> None:
        """Ask it to end, and wait; kill it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
