"""Starting real servers: what is told before minutes are spent."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from apollo_tp.errors import ConfigError
from tests.support import processes


def test_a_missing_plugin_is_told_before_a_server_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM would serve without it and say nothing; the trainer would then wait for manifests that never come."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    started = []
    monkeypatch.setattr(processes, "ManagedProcess", lambda *arguments: started.append(arguments))
    with pytest.raises(ConfigError, match=r"got no entry point 'apollo' .*pip install -e \."):
        processes.start_server(tmp_path, 1, tmp_path, tmp_path / "log")
    assert not started
    monkeypatch.undo()
    assert any(entry.name == "apollo" for entry in importlib.metadata.entry_points(group="vllm.general_plugins"))
