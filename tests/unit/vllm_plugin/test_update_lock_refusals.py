"""Which servers and options the update lock takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apollo_tp.config import CacheMode, SyncMode
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.errors import ConfigError
from apollo_tp.training.update_gate import Lock, needs_lock
from tests.support.locked_server import Plugin, attach, eventually, options


@pytest.mark.parametrize(
    ("mode", "cache", "needed"),
    [
        (SyncMode.hogwild, CacheMode.none, False),
        (SyncMode.hogwild, CacheMode.salt, True),
        (SyncMode.hogwild, CacheMode.reset, True),
        (SyncMode.step_lock, CacheMode.none, True),
        (SyncMode.drain, CacheMode.none, True),
    ],
)
def test_nothing_is_asked_of_the_server_by_default_alone(mode: SyncMode, cache: CacheMode, needed: bool) -> None:
    """A refreshed cache needs the plugin too, though nothing pauses."""
    assert needs_lock(options(mode, cache)) is needed


def test_a_cache_that_cannot_be_emptied_is_refused_at_once(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not step after step in the log."""

    async def fails(**_: Any) -> bool:
        return False

    monkeypatch.setattr(plugin.vllm, "reset_prefix_cache", fails)
    with pytest.raises(ConfigError, match=r"cache=reset.*vLLM did not reset its prefix cache"):
        attach(plugin, options(SyncMode.hogwild, CacheMode.reset))
    eventually(lambda: plugin.lock._attached is None)
    assert not plugin.vllm.paused


def test_one_trainer_at_a_time(plugin: Plugin) -> None:
    """A second connection is refused, and the place is free again when the first one is gone."""
    first = attach(plugin, options(SyncMode.drain))
    with pytest.raises(ConfigError, match="second trainer"):
        attach(plugin, options(SyncMode.drain))
    first.close()
    eventually(lambda: plugin.lock._attached is None)
    attach(plugin, options(SyncMode.drain)).close()


@pytest.mark.parametrize("case", ["no plugin", "several API servers"])
def test_servers_that_cannot_be_paused_are_refused(tmp_path: Path, case: str) -> None:
    """Cause and cure are in the message."""
    plugin = Plugin(tmp_path, "API server processes: got 2") if case != "no plugin" else None
    try:
        with pytest.raises(ConfigError, match="VLLM_PLUGINS=apollo" if plugin is None else "got 2") as caught:
            Lock(tmp_path, options(SyncMode.step_lock), 0, Alarm(0, [], bytearray(4)))
        assert "sync=hogwild cache=none" in str(caught.value)
    finally:
        if plugin:
            plugin.close()
