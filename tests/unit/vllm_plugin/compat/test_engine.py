"""The prefix cache is emptied through the engine client, with that of a KV connector."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from apollo_tp.vllm_plugin.compat import engine
from apollo_tp.vllm_plugin.compat.engine import Engine


@pytest.mark.parametrize(("connector", "resets"), [(None, False), ("Mine", True), ("Mine", False)])
def test_a_connectors_cache_is_emptied_too(
    connector: str | None, resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is one: some releases answer that they could not reset what is not there."""
    monkeypatch.setattr(engine, "connector_resets", lambda _: resets)
    asked: list[dict[str, bool]] = []

    async def reset(**options: bool) -> bool:
        asked.append(options)
        return True

    transfer = SimpleNamespace(kv_connector=connector) if connector else None
    client = SimpleNamespace(
        pause_generation=None, resume_generation=None, vllm_config=SimpleNamespace(kv_transfer_config=transfer),
        reset_prefix_cache=reset,
    )  # fmt: skip
    if connector and not resets:
        with pytest.raises(RuntimeError, match="KV connector Mine cannot be emptied"):
            asyncio.run(Engine(client).reset_prefix_cache())
        assert asked == []
    else:
        asyncio.run(Engine(client).reset_prefix_cache())
        assert asked == [{"reset_running_requests": True} | ({"reset_connector": True} if connector else {})]
