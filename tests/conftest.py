"""The fast tier: ``pytest -m "not slow"`` leaves out what takes long, and still covers every package."""

from __future__ import annotations

from pathlib import Path

import pytest

SLOW_FOLDERS = {"e2e", "gpu", "hostile"}
SLOW_FIXTURES = {"checkpoints"}
"""Checkpoints of every family, traced by real vLLM's loader: a minute in each process that needs them."""
SLOW_FILES = {
    "multirank/launch/test_launcher_death.py",
    "multirank/optim/test_collective_faults.py",
    "multirank/checkpoint/test_optimizer_state.py",
    "unit/cli/test_faults.py",
    "unit/coordinator/http/test_fuzz.py",
    "unit/coordinator/jobs/test_crash_recovery.py",
    "unit/coordinator/jobs/test_evaluation.py",
    "unit/coordinator/samples/test_served_tokens.py",
    "unit/launch/test_nccl.py",
    "unit/optim/test_kernels.py",
    "unit/scripts/test_mutate.py",
    "unit/vllm_plugin/compat/test_hooked_vllm.py",
    "unit/vllm_plugin/test_trace.py",
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
