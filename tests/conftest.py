"""The fast tier: ``pytest -m "not slow"`` leaves out what takes long, and still covers every package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.checkpoint_folder import CheckpointFolder

SLOW_FOLDERS = {"e2e", "gpu", "hostile"}
SLOW_FIXTURES = {"checkpoints"}
"""Checkpoints of every family, traced by real vLLM's loader: a minute in each process that needs them."""
SLOW_FILES = {
    "multirank/checkpoint/test_optimizer_state.py",
    "multirank/distributed/test_alarm.py",
    "multirank/distributed/test_control.py",
    "multirank/launch/test_join.py",
    "multirank/launch/test_launcher_death.py",
    "multirank/optim/test_collective_faults.py",
    "multirank/optim/test_owners.py",
    "multirank/optim/test_reference.py",
    "unit/cli/test_faults.py",
    "unit/coordinator/captures/test_captures.py",
    "unit/coordinator/http/test_clients.py",
    "unit/coordinator/http/test_connections.py",
    "unit/coordinator/http/test_curve.py",
    "unit/coordinator/http/test_fuzz.py",
    "unit/coordinator/http/test_json_bodies.py",
    "unit/coordinator/http/test_limits.py",
    "unit/coordinator/jobs/test_commits.py",
    "unit/coordinator/jobs/test_crash_recovery.py",
    "unit/coordinator/jobs/test_evaluation.py",
    "unit/coordinator/jobs/test_fairness.py",
    "unit/coordinator/jobs/test_guard.py",
    "unit/coordinator/jobs/test_restoring.py",
    "unit/coordinator/jobs/test_rollouts.py",
    "unit/coordinator/jobs/test_saving.py",
    "unit/coordinator/jobs/test_scheduler.py",
    "unit/coordinator/jobs/test_writers.py",
    "unit/coordinator/samples/test_limits.py",
    "unit/coordinator/samples/test_served_tokens.py",
    "unit/coordinator/samples/test_turns.py",
    "unit/inspect/test_copy_trial.py",
    "unit/launch/test_arguments.py",
    "unit/launch/test_compose.py",
    "unit/launch/test_ends.py",
    "unit/launch/test_nccl.py",
    "unit/launch/test_orphans.py",
    "unit/model/test_fp8.py",
    "unit/model/test_remote_code.py",
    "unit/optim/test_kernels.py",
    "unit/scripts/test_mutate.py",
    "unit/vllm_plugin/compat/test_hooked_vllm.py",
    "unit/vllm_plugin/test_trace.py",
    "unit/vllm_plugin/test_update_lock.py",
}
"""Each takes more than ten seconds on two cores."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile-long", action="store_true", help="tests/hostile at full length, for an hour")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root)
        fixtures = set(getattr(item, "fixturenames", ()))
        if path.parts[0] in SLOW_FOLDERS or fixtures & SLOW_FIXTURES or path.as_posix() in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def checkpoint_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Begun before the first test if a later one needs it: it takes one core a minute."""
    from tests.support.checkpoint_folder import CheckpointFolder  # imports torch, as does the next one

    base = tmp_path_factory.getbasetemp()
    found = CheckpointFolder(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
    if any("checkpoints" in getattr(item, "fixturenames", ()) for item in request.session.items):
        found.begin()
    return found


@pytest.fixture(scope="session")
def checkpoints(checkpoint_folder: CheckpointFolder) -> Path:
    """Tiny checkpoints of every family with the manifests that real vLLM's loader gives. Nobody writes into it."""
    from tests.support.ranks import start_origins

    start_origins(4)
    return checkpoint_folder.complete()
