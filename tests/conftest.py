"""The fast tier: ``pytest -m "not slow"`` leaves out what takes long, and still covers every package."""

from __future__ import annotations

from pathlib import Path

import pytest

SLOW_FOLDERS = {"e2e", "gpu", "hostile"}
SLOW_FIXTURES = {"checkpoints"}
"""Checkpoints of every family, traced by real vLLM's loader: a minute in each process that needs them."""
SLOW_FILES = {
    "multirank/checkpoint/test_optimizer_state.py",
    "multirank/distributed/test_alarm.py",
    "multirank/launch/test_join.py",
    "multirank/launch/test_launcher_death.py",
    "multirank/optim/test_collective_faults.py",
    "multirank/optim/test_owners.py",
    "multirank/optim/test_reference.py",
    "unit/cli/test_faults.py",
    "unit/coordinator/captures/test_captures.py",
    "unit/coordinator/http/test_connections.py",
    "unit/coordinator/http/test_fuzz.py",
    "unit/coordinator/http/test_json_bodies.py",
    "unit/coordinator/http/test_limits.py",
    "unit/coordinator/jobs/test_commits.py",
    "unit/coordinator/jobs/test_crash_recovery.py",
    "unit/coordinator/jobs/test_evaluation.py",
    "unit/coordinator/jobs/test_guard.py",
    "unit/coordinator/jobs/test_rollouts.py",
    "unit/coordinator/jobs/test_scheduler.py",
    "unit/coordinator/samples/test_limits.py",
    "unit/coordinator/samples/test_served_tokens.py",
    "unit/coordinator/samples/test_turns.py",
    "unit/inspect/test_copy_trial.py",
    "unit/launch/test_arguments.py",
    "unit/launch/test_compose.py",
    "unit/launch/test_nccl.py",
    "unit/model/test_fp8.py",
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
