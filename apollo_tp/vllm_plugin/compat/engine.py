"""Pause, resume and the prefix cache of vLLM, through the engine client (AsyncLLM) of its API server."""

from __future__ import annotations

import asyncio
import functools
from typing import Any


def connector_resets(transfer: Any) -> bool:
    """Whether the KV connector of this ``KVTransferConfig`` can be emptied; of several connectors, whether all can.

    vLLM reports success for a connector that has no method for it.
    """
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    parts = (
        (transfer.kv_connector_extra_config or {}).get("connectors")
        if transfer.kv_connector == "MultiConnector"
        else None
    )
    if parts:
        return all(connector_resets(KVTransferConfig(**part)) for part in parts)
    kind = KVConnectorFactory.get_connector_class(transfer)
    return bool(kind.reset_cache is not KVConnectorBase_V1.reset_cache)


class Engine:
    """What the update lock needs of vLLM's engine client.

    vLLM knows one pause at a time, whoever asked for it. While the update lock has the engine (from ``acquire`` to
    ``resume``), the pauses and resumes of other callers wait here.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._salt = ""
        self._admits = asyncio.Event()
        self._admits.set()
        self._pause, self._resume = client.pause_generation, client.resume_generation
        self._free, self._complete = asyncio.Event(), asyncio.Event()
        self._free.set()
        self._complete.set()
        self._paused_by_others = self._paused = False
        client.pause_generation, client.resume_generation = self._pause_of_others, self._resume_of_others

    async def _until_free(self) -> None:
        while not self._free.is_set():  # It may be acquired again before this task runs.
            await self._free.wait()

    async def _pause_of_others(self, *args: Any, **kwargs: Any) -> Any:
        await self._until_free()
        self._complete = complete = asyncio.Event()
        pausing = asyncio.ensure_future(self._pause(*args, **kwargs))
        pausing.add_done_callback(lambda _: complete.set())
        return await asyncio.shield(pausing)  # vLLM continues to pause after its caller has gone away.

    async def _resume_of_others(self, *args: Any, **kwargs: Any) -> Any:
        await self._until_free()
        self._complete.set()  # It also ends a pause that still waits for running requests.
        return await self._resume(*args, **kwargs)

    async def acquire(self) -> None:
        """Keep other callers from pausing or resuming until ``resume``. First wait for a pause of theirs that still
        waits for running requests: vLLM reports itself as paused from its beginning."""
        while not self._complete.is_set():
            await self._complete.wait()
        self._free.clear()
        self._paused_by_others = bool(await self._client.is_paused())

    async def pause(self, *, drain: bool) -> None:
        """Pause, and return when no request runs. Running requests are frozen, or finished first (``drain``); new ones wait
        either way. Does nothing where others have paused vLLM."""
        if not self._paused_by_others:
            self._paused = True
            if drain:  # vLLM release: from 0.33 on, vLLM refuses new requests while it finishes the running ones
                self._wrap_requests()
                self._admits.clear()
            await self._pause(mode="wait" if drain else "keep", clear_cache=False)

    async def resume(self) -> None:
        """Let requests run again unless others have paused them. This also ends a pause that still waits for running
        requests."""
        paused, self._paused = self._paused, False
        try:
            if paused:
                await self._resume()
        finally:
            self._admits.set()
            self._free.set()

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, and that of a KV connector.

        vLLM cannot do so while cache blocks are in use. Running requests therefore give up their blocks, and are computed
        again from their prompt and the tokens generated so far; their streams continue. Raises RuntimeError if vLLM could
        not do it.
        """
        options = {"reset_running_requests": True}
        transfer = self._client.vllm_config.kv_transfer_config
        # vLLM release: before 0.32 some report a failure if a connector is to be reset where there is none.
        if transfer is not None:
            if not connector_resets(transfer):
                raise RuntimeError(
                    f"KV connector {transfer.kv_connector} cannot be emptied, expected one that can; use cache=salt, or "
                    "serve without it"
                )
            options["reset_connector"] = True
        if not await self._client.reset_prefix_cache(**options):
            raise RuntimeError("vLLM did not reset its prefix cache, or its KV connector not its own")

    async def label_weights(self, version: str) -> None:
        """Let vLLM report ``version`` with the tokens that it samples from now on, and at its /weight_info."""
        # vLLM release: before 0.32 some have no version of the weights
        if hasattr(self._client, "update_weight_version"):
            await self._client.update_weight_version(version)

    def salt_requests(self, salt: str) -> None:
        """From now on, let requests share prefix-cache entries only with requests of the same ``salt`` ("" for no salt).

        The client's own ``cache_salt`` of a request stays.
        """
        self._salt = salt
        self._wrap_requests()

    def _wrap_requests(self) -> None:
        """Have requests wait until they are admitted, and take the salt of that moment. All are sent by
        ``add_request_async``, however they were made; it is wrapped once."""
        core = self._client.engine_core
        original = core.add_request_async
        if hasattr(original, "apollo_tp"):
            return

        @functools.wraps(original)
        async def add_request_async(request: Any) -> Any:
            while not self._admits.is_set():  # It may be closed again before this task runs.
                await self._admits.wait()
            request.cache_salt = request.cache_salt or self._salt or None
            return await original(request)

        add_request_async.apollo_tp = True  # type: ignore[attr-defined]
        core.add_request_async = add_request_async
