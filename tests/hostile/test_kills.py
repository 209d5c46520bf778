"""kill -9 at many random points of jobs on one state folder that grows old: nothing lost, nothing trained twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import CoordinatorProcess
from tests.support.kills import VICTIMS, RanksProcess, kill_at_a_random_point

pytestmark = pytest.mark.timeout(3600)


def test_kills(tmp_path: Path, count: Any, report: Any) -> None:
    """The coordinator, rank 0 or both are killed; all jobs of all rounds share one database and one journal."""
    coordinator = CoordinatorProcess(tmp_path).start()
    ranks = RanksProcess(coordinator)
    ranks.start()
    draw, killed = random.Random("kills"), dict.fromkeys(VICTIMS, 0)
    try:
        for seed in range(count("kills")):
            who = draw.choice(VICTIMS)
            kill_at_a_random_point(coordinator, ranks, who, f"hostile{seed}")
            killed[who] += 1
    finally:
        ranks.kill()
        coordinator.stop()
    report(f"{sum(killed.values())} kills: {killed}")
