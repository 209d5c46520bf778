"""Files and uploads whose time is over are removed."""

from __future__ import annotations

import asyncio
import logging
import time

from apollo_tp.coordinator.http.openai_uploads import Uploads
from apollo_tp.coordinator.jobs.job import TERMINAL, State
from apollo_tp.coordinator.jobs.store import Store

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 30.0


async def remove_expired(store: Store, now: float) -> None:
    """Remove expired files; one that a job needs is removed once no open job names it."""
    expired = [
        file
        for file in await store.in_thread(lambda reader: reader.files())
        if file.expires_at is not None and file.expires_at <= now
    ]
    if not expired:
        return
    specs = [job.spec for job in store.jobs(*set(State) - TERMINAL)]
    needed = {name for spec in specs for name in (spec.training_file, spec.validation_file)}
    for file in expired:
        if file.id not in needed:
            log.info("%s (%s) has expired", file.id, file.filename)
            await store.delete_file(file.id)


async def expire(store: Store, uploads: Uploads) -> None:
    """Remove what has expired, now and then."""
    while True:
        await remove_expired(store, time.time())
        uploads.remove_expired()
        await asyncio.sleep(INTERVAL_SECONDS)
