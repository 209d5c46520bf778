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


@pytest.mark.parametrize("drain", [True, False])
def test_new_requests_wait_for_the_end_of_a_pause(drain: bool) -> None:
    """vLLM 0.33 refuses what arrives while it finishes running requests, and queues what arrives while they are frozen."""
    refuses, sent = False, []

    async def pause(mode: str, clear_cache: bool) -> None:
        nonlocal refuses
        refuses = mode == "wait"

    async def resume() -> None:
        nonlocal refuses
        refuses = False

    async def add(request: SimpleNamespace) -> None:
        assert not refuses, "the client would get an error"
        sent.append(request.name)

    async def is_paused() -> bool:
        return False

    async def ready() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def run() -> None:
        core = SimpleNamespace(add_request_async=add)
        client = SimpleNamespace(
            pause_generation=pause, resume_generation=resume, is_paused=is_paused, engine_core=core
        )
        locked = Engine(client)
        for turn in range(2):
            await locked.acquire()
            await locked.pause(drain=drain)
            arrived = asyncio.ensure_future(core.add_request_async(SimpleNamespace(name=turn, cache_salt=None)))
            gone = asyncio.ensure_future(core.add_request_async(SimpleNamespace(name="gone", cache_salt=None)))
            await ready()
            assert drain is (turn not in sent)
            gone.cancel()
            await ready()
            await locked.resume()
            await arrived
            assert sent.count(turn) == 1

    asyncio.run(run())
    assert drain is ("gone" not in sent)
