"""The plugin's end of the update lock, over a fake of vLLM's engine client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from apollo_tp.config import CacheMode, SyncConfig, SyncMode
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.training.update_gate import Lock
from apollo_tp.vllm_plugin.compat.engine import Engine
from apollo_tp.vllm_plugin.update_lock import UpdateLock

LEASE_SECONDS = 1.5


class FakeVllm:
    """vLLM's engine client: one pause, whoever asked for it. While ``busy``, a pause that waits for requests does not
    end."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.paused = self.busy = False
        self.vllm_config = SimpleNamespace(kv_transfer_config=None)
        self.engine_core = SimpleNamespace(add_request_async=None)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(mode)
        self.paused = True
        while mode == "wait" and self.busy:  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.01)

    async def resume_generation(self) -> None:
        self.calls.append("resume")
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        assert reset_running_requests
        self.calls.append("reset")
        return True


class RecordingEngine(Engine):
    def salt_requests(self, salt: str) -> None:
        self._client.calls.append(f"salt {salt}" if salt else "no salt")


class Plugin:
    """The plugin's end in an event loop of its own."""

    def __init__(self, folder: Path, refusal: str = "") -> None:
        self.vllm, self.folder = FakeVllm(), folder
        self.loop = asyncio.new_event_loop()
        self.lock = UpdateLock(RecordingEngine(self.vllm), refusal, LEASE_SECONDS)
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        path = folder / instance_folder.SYNC_SOCKET
        asyncio.run_coroutine_threadsafe(self.lock.start(path), self.loop).result(5)

    def others(self, what: str, **options: Any) -> concurrent.futures.Future[None]:
        """Somebody else's pause_generation or resume_generation, as vLLM's /pause and /resume call it; begun."""

        async def call() -> None:
            begun.set()
            await getattr(self.vllm, what)(**options)

        begun = threading.Event()
        future = asyncio.run_coroutine_threadsafe(call(), self.loop)
        assert begun.wait(5)
        self.run_ready()
        return future

    def run_ready(self) -> None:
        """Wait until the loop has run what is ready to run."""
        for _ in range(5):
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(5)

    def close(self) -> None:
        async def end() -> None:
            await self.lock.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()


def options(mode: SyncMode, cache: CacheMode = CacheMode.none, timeout_seconds: float = 5.0) -> SyncConfig:
    return SyncConfig(mode=mode, cache=cache, timeout_seconds=timeout_seconds)


def attach(plugin: Plugin, config: SyncConfig, ranks: list[processes.ProcessId] | None = None) -> Lock:
    return Lock(plugin.folder, config, 7, Alarm(0, ranks or [], bytearray(4 * max(1, len(ranks or [])))))


def eventually(condition) -> float:
    """Seconds until ``condition()`` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 10
        time.sleep(0.01)
    return time.monotonic() - start
