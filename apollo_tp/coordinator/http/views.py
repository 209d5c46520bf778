"""Jobs, status and events as the JSON that clients see."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from apollo_tp.coordinator.jobs.changes import Changes
from apollo_tp.coordinator.jobs.job import Event, Job, State
from apollo_tp.coordinator.jobs.rank_link import RankLink
from apollo_tp.coordinator.jobs.reader import Reader
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.wire import commands

KEEP_ALIVE_SECONDS = 15.0
STATUS_SECONDS = 0.2
"""How old an answer of /train/status may be while nothing is stored: heartbeats store nothing."""


def job_view(job: Job, scheduler: Scheduler) -> dict[str, Any]:
    """A job as clients of /train see it."""
    view: dict[str, Any] = {"object": "train.job"} | msgspec.to_builtins(job)
    if scheduler.running is not None and scheduler.running.id == job.id:
        view["tokens_per_second"] = scheduler.progress.tokens_per_second()
        view["seconds_left"] = scheduler.progress.seconds_left(job.total_steps - job.step)
    elif job.training_seconds > 0:
        view["tokens_per_second"] = job.tokens / job.training_seconds
        view["seconds_left"] = None
    return view


def status_view(scheduler: Scheduler, store: Store) -> dict[str, Any]:
    """What is running, waiting and done; the last losses; the trainer."""
    link = scheduler.link
    trainer: dict[str, Any] = {"connected": link.connected, "weight_version": link.weight_version}
    if link.hello is not None:
        hello = link.hello
        trainer |= {
            "instance_id": hello.instance_id, "model": hello.model_path, "served_model_names": hello.served_model_names,
            "num_replicas": hello.num_replicas, "replicas": replicas_view(link),
            "num_ranks": hello.num_ranks, "num_parameters": hello.num_parameters, "vocab_size": hello.vocab_size,
            "max_sequence_tokens": hello.max_sequence_tokens, "optimizer": hello.optimizer, "gradients": hello.gradients,
            "memory": hello.memory, "attention_window": hello.attention_window,
            "sync": hello.sync, "cache": hello.cache, "qos": hello.qos, "busy_with": link.busy_with,
        }  # fmt: skip
    if not link.connected:
        trainer["reason"] = link.gone_reason
    running = scheduler.running
    waiting = store.active.first(100, State.queued, State.validating_files, State.paused)
    checkpoints, _ = store.page_of_checkpoints(limit=1)
    return {
        "object": "train.status",
        "time": time.time(),
        "trainer": trainer,
        "running": job_view(running, scheduler) if running else None,
        "queue": [
            {
                "id": job.id,
                "state": job.state.value,
                "step": job.step,
                "total_steps": job.total_steps,
                "resumable": job.resumable,
                "created_at": job.created_at,
            }
            for job in waiting
        ],
        "counts": {state.value: count for state, count in store.count_jobs().items()},
        "last_losses": [{"job_id": j, "step": step, "loss": loss} for j, step, loss in scheduler.recent_losses],
        "last_checkpoint": msgspec.to_builtins(checkpoints[0]) if checkpoints else None,
        "unsaved": bool(store.get_meta("unsaved")),
    }


def replicas_view(link: RankLink) -> list[dict[str, Any]]:
    """The servers that are trained as one. All have the same weights between steps; ``lag_seconds`` is how much later than
    the first one each had those of the last step."""
    assert link.hello is not None
    replicas = link.hello.replicas
    lags = link.replica_lag_seconds if len(link.replica_lag_seconds) == len(replicas) else [None] * len(replicas)
    health = "in_step" if link.connected else "no_trainer"
    return [
        msgspec.to_builtins(replica) | {"weight_version": link.weight_version, "lag_seconds": lag, "health": health}
        for replica, lag in zip(replicas, lags, strict=True)
    ]


class CachedStatus:
    """The body of /train/status, made once per change and not once per client: 50 polling clients cost as much as one."""

    def __init__(self, scheduler: Scheduler, store: Store, changes: Changes) -> None:
        self._scheduler, self._store, self._changes = scheduler, store, changes
        self._version, self._made, self._body = -1, 0.0, b""

    def body(self) -> bytes:
        now = time.monotonic()
        if self._version != self._changes.version or now - self._made > STATUS_SECONDS:
            self._body = msgspec.json.encode(status_view(self._scheduler, self._store))
            self._version, self._made = self._changes.version, now
        return self._body


class CachedLayout:
    """The body of /train/layout and its ETag, made once per trainer: large models have thousands of rows."""

    def __init__(self) -> None:
        self._of: commands.Hello | None = None
        self._body, self._tag = b"", ""

    def body(self, hello: commands.Hello | None) -> tuple[bytes, str]:
        """Body and ETag for the trainer that said ``hello``."""
        if not self._body or hello is not self._of:
            self._body = msgspec.json.encode({"object": "list", "data": hello.layout if hello else []})
            self._of, self._tag = hello, f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'
        return self._body, self._tag


def event_view(event: Event) -> bytes:
    """An event as clients of /train see it, in JSON."""
    return b'{"object":"train.event",' + event.encoded[1:]


def events_page(reader: Reader, job_id: str, after: int, limit: int) -> bytes:
    """One page of a job's events as a JSON list. Call it on a thread: 10,000 events take half a second."""
    events, more = reader.page_of_events(job_id, after=after, limit=limit)
    data = b",".join(map(event_view, events))
    return b'{"object":"list","data":[' + data + b'],"has_more":' + msgspec.json.encode(more) + b"}"


def _frame(event: Event) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.type.encode(), event_view(event))


async def event_stream(store: Store, changes: Changes, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Server-sent events of a job: those after event ``after``, then new ones as they happen, until the job is over.

    The SSE id is the event's, so that a client that reconnects with Last-Event-ID misses and repeats nothing.
    """
    quiet_since = time.monotonic()
    while True:
        change = changes.upcoming(job_id)
        over = job_id not in store.active  # looked at before the events: the last one is among them if the job is over
        events = await store.news(job_id, after)
        if events:  # in one part: hundreds of followers that begin at once would hold up all others by single ones
            after = events[-1].id
            yield b"".join(map(_frame, events))
            await asyncio.sleep(0)
            quiet_since = time.monotonic()
            continue
        if over:
            yield b"event: end\ndata: {}\n\n"
            return
        left = quiet_since + KEEP_ALIVE_SECONDS - time.monotonic()
        if left <= 0 or not await changes.wait(left, change):
            quiet_since = time.monotonic()
            yield b": still there\n\n"
