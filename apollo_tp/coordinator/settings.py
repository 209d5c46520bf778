"""Settings that ``apollo_tp.launch`` passes to the coordinator, as a JSON file (0600) named on the command line."""

from __future__ import annotations

from pathlib import Path

import msgspec

from apollo_tp.config import CaptureConfig, LearnConfig, RlConfig, ServiceConfig
from apollo_tp.errors import DECODE_ERRORS, ConfigError
from apollo_tp.shards.serving import Serving

EXIT_STORAGE = 4
"""Exit status when nothing can be stored, for example on a full disk: the launcher starts this process again."""

WAITING_FILE = "coordinator_waiting.json"
"""In the base of the runtime folder: the address of a coordinator whose server is not ready."""


class WaitHere(msgspec.Struct, tag="wait_here", forbid_unknown_fields=True, frozen=True):
    """The first order of trainer rank 0: answer on this address; ``base`` is the base of the runtime folder."""

    service: ServiceConfig
    base: str


class WaitingFor(msgspec.Struct, tag="waiting_for", forbid_unknown_fields=True, frozen=True):
    """What the trainer waits for from now on."""

    reason: str


class Begin(msgspec.Struct, tag="begin", forbid_unknown_fields=True, frozen=True):
    """The server is ready: ``config`` is the path of the settings."""

    config: str


Order = WaitHere | WaitingFor | Begin


class Settings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """All settings of the coordinator process. ``instance_dir`` is the server's private folder (see runtime/).

    ``model_path`` is a local folder, "" if there is none here. ``serving`` is how the server turns texts into token ids; its
    tokenizer is in ``instance_dir``.
    ``parent_pid`` is the process whose end ends this one; None for a coordinator that runs alone (tests).
    """

    service: ServiceConfig = msgspec.field(default_factory=ServiceConfig)
    capture: CaptureConfig = msgspec.field(default_factory=CaptureConfig)
    learn: LearnConfig = msgspec.field(default_factory=LearnConfig)
    instance_dir: str
    model_path: str = ""
    serving: Serving = Serving()
    max_sequence_tokens: int = 2048
    """Used until rank 0 has reported its own limit."""
    max_skipped_steps: int = 5
    rl: RlConfig = msgspec.field(default_factory=RlConfig)
    command_timeout_seconds: float = 600.0
    checkpoint_after_idle_seconds: float | None = 300.0
    parent_pid: int | None = None


def load(path: Path) -> Settings:
    """Read the settings file. Raises ConfigError naming the field that is wrong."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except (OSError, *DECODE_ERRORS) as error:
        raise ConfigError(
            f"coordinator settings {path}: {error}; expected the JSON file that apollo_tp.launch writes"
        ) from error
