"""When the launcher starts its coordinator again, and when it gives up."""

import os
import signal

import pytest

from apollo_tp.coordinator.settings import EXIT_STORAGE
from apollo_tp.errors import ConfigError
from apollo_tp.launch import coordinator_process


class Ended:
    """A coordinator that has ended with this status."""

    def __init__(self, status):
        self.poll = lambda: status


@pytest.mark.parametrize(
    ("status", "earlier_life", "age", "outcome"),
    [
        (EXIT_STORAGE, 60.0, 0.5, "waits"),
        (EXIT_STORAGE, 60.0, 6.0, "starts"),
        (EXIT_STORAGE, 0.0, 6.0, "raises"),  # it never could store anything
        (-signal.SIGKILL, 0.0, 0.5, "starts"),
        (-signal.SIGTERM, 0.0, 0.5, "starts"),  # before it handles signals
        (0, 0.0, 0.5, "starts"),  # it handled one
        (1, 60.0, 0.5, "raises"),
    ],
)
def test_when_a_coordinator_is_started_again(monkeypatch, status, earlier_life, age, outcome):
    """After a full disk for as long as it takes; not if it could not have worked."""
    clock, starts = [100.0], []
    monkeypatch.setattr(coordinator_process.time, "monotonic", lambda: clock[0])
    process = object.__new__(coordinator_process.CoordinatorProcess)
    process._has_lived, process._started_at, process._process = False, clock[0], Ended(None)
    process._reason_fd = os.memfd_create("reason")
    monkeypatch.setattr(process, "_start", lambda: starts.append(clock[0]))
    clock[0] += earlier_life
    process.check()
    process._started_at, process._process = clock[0], Ended(status)
    clock[0] += age
    if outcome == "raises":
        with pytest.raises(ConfigError, match=f"exit status {status}"):
            process.check()
    else:
        process.check()
    assert bool(starts) == (outcome == "starts")
