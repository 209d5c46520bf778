"""Tests on real GPUs with real vLLM: skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        needed = 2 if item.get_closest_marker("multigpu") else 1
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, found {torch.cuda.device_count()}"))
