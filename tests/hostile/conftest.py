"""How much of each attack runs, and the table of what ran."""

from __future__ import annotations

from collections.abc import Callable

import pytest

COUNTS = {
    "requests": (2_000, 1_000_000),
    "damaged requests": (300, 100_000),
    "frames": (4_000, 1_000_000),
    "kills": (6, 200),
    "disks": (1, 12),
}
"""Number of each in `make test`, and with ``--hostile-long``."""
REPORT = pytest.StashKey[list[str]]()


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[str], int]:
    """How many of a kind to send."""
    return lambda kind: COUNTS[kind][request.config.getoption("--hostile-long")]


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to what is printed at the end of the run."""
    lines = request.config.stash.setdefault(REPORT, [])
    return lambda line: lines.append(f"{request.node.name}: {line}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(REPORT, []):
        terminalreporter.section("hostile tests")
        for line in lines:
            terminalreporter.write_line(line)
