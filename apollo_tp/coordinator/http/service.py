"""What all routes share: the parts of the service, and how to find, list and act on jobs."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Depends
from starlette.requests import Request

from apollo_tp.coordinator.captures.arrival import Versions, Votes
from apollo_tp.coordinator.captures.store import Captures
from apollo_tp.coordinator.http.bodies import LargeBodies
from apollo_tp.coordinator.http.parameters import PageQuery
from apollo_tp.coordinator.http.server_metrics import LatencyHistory
from apollo_tp.coordinator.http.views import CachedLayout, CachedStatus
from apollo_tp.coordinator.http.work import IsAbandoned, Workers
from apollo_tp.coordinator.jobs.changes import Changes
from apollo_tp.coordinator.jobs.job import Checkpoint, Job, State, StoredFile, check_action
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.storage_error import StorageError, Trouble, named
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.samples.schema import Truncate
from apollo_tp.coordinator.settings import Settings
from apollo_tp.errors import DECODE_ERRORS, RequestError, refuse
from apollo_tp.shards.serving import Serving

MAX_SAMPLES = 64
MAX_DRY_RUNS = 4
"""So many requests at once are rendered or wait for that; further ones are answered 429."""
Record = TypeVar("Record", Job, Checkpoint, StoredFile)
Listed = TypeVar("Listed", Checkpoint, StoredFile)


@dataclass
class Service:
    """The parts that every route needs. ``model_vocab_size`` is the model folder's, until rank 0 has reported its own.
    Where texts are refused, ``renderer`` is the reason, a string."""

    settings: Settings
    store: Store
    scheduler: Scheduler
    changes: Changes
    renderer: Renderer | str
    model_vocab_size: int | None
    captures: Captures | None = None
    """Stored completions; None while none are stored."""

    def __post_init__(self) -> None:
        self.status = CachedStatus(self.scheduler, self.store, self.changes)
        self.samples, self.dry_runs = Workers("samples", 2, MAX_SAMPLES), Workers("dry runs", 1, MAX_DRY_RUNS)
        self.layout = CachedLayout()
        self.latency = LatencyHistory(self.settings.service.server_url, lambda: self.scheduler.running is not None)
        self.large_bodies = LargeBodies(self.store.disk.files_dir)
        self.adding_file = asyncio.Lock()  # held from the check of max_files until the file is stored
        self._promised = 0  # bytes that requests in progress are writing
        self.streams: collections.Counter[str] = collections.Counter()
        self.votes, self._versions = Votes(self.settings.learn.votes_per_minute), Versions()
        self.scheduler.on_step.append(lambda _, figures: self._versions.add(figures.weight_version))

    def version_at(self, when: float) -> int | None:
        """The weight version that was served at a time (in seconds since the epoch)."""
        return self._versions.at(when, self.scheduler.link.weight_version)

    def intake(self, truncate: Truncate, is_abandoned: IsAbandoned = lambda: False) -> Intake:
        """An Intake with the current limits."""
        hello = self.scheduler.link.hello
        limits = Limits(self.model_vocab_size, self.settings.max_sequence_tokens)
        if hello is not None:
            limits = Limits(hello.vocab_size, hello.max_sequence_tokens)
        return Intake(self.renderer, limits, truncate, is_abandoned)

    def find_job(self, job_id: str) -> Job:
        """The job of this id, as it is now. Raises RequestError 404."""
        return found(self.store.shown_job(job_id), "job", job_id)

    async def list_jobs(
        self, page: PageQuery, view: Callable[[Job, Scheduler], dict[str, Any]], **filters: Any
    ) -> dict[str, Any]:
        """A page of jobs, newest first. ``filters`` are those of Store.page_of_jobs."""
        after = page.after or None
        last = self.store.job(after) if after else None
        if after and (last is None or last.source != filters.get("source", last.source)):
            raise unknown_cursor(after, "a job of this list")
        jobs, more = await self.store.in_thread(lambda db: db.page_of_jobs(after=after, limit=page.limit, **filters))
        return listing([view(self.find_job(job.id), self.scheduler) for job in jobs], more)

    def check_disk(self, more: int) -> None:
        """Raise RequestError 413 if ``more`` bytes would exceed the quota, and StorageError 507 if they do not fit."""
        limit = self.settings.service.max_state_bytes
        if (used := self.store.disk.used_bytes + self._promised) + more > limit:
            got, expected = f"{more} bytes in addition to {used} in use", f"at most {limit} together; delete files"
            raise refuse("body", got, expected, status=413, code="disk_quota")
        self.store.disk.reserve.check(more)

    @contextlib.contextmanager
    def storing(self, num_bytes: int) -> Iterator[None]:
        """Room for so many bytes while the block writes them. Raises RequestError 413 if they exceed the quota, together
        with what other requests are writing, and StorageError 507 if the disk has no room or becomes full meanwhile."""
        self.check_disk(num_bytes)
        self._promised += num_bytes
        try:
            yield
        except (OSError, StorageError) as error:
            told = error if isinstance(error, StorageError) else named(error, self.store.disk.database.parent)
            if told.trouble is Trouble.full:
                told = self.store.disk.reserve.full(num_bytes)
            raise told from error
        finally:
            self._promised -= num_bytes

    async def act(self, job_id: str, action: str) -> Job:
        """Cancel, pause or resume, and store that. A running job does so at its next step. Raises RequestError 404, 409."""
        job = found(self.scheduler.live(job_id), "job", job_id)
        if job.state is State.cancelled and action == "cancel":
            return job
        check_action(job, action)
        if job.state is State.running:
            job.wanted = "" if action == "resume" else action
            message = "The pause is withdrawn" if action == "resume" else f"Will {action} after the steps in flight"
            await self.store.save_job(job, message)
            return job
        if action == "cancel":
            job.state, job.finished_at = State.cancelled, time.time()
        else:
            job.state = State.paused if action == "pause" else State.queued
        await self.store.save_job(job, f"Job {job.state.value}")
        self.scheduler.wake()
        return job

    def page_of_checkpoints(self, page: PageQuery, **filters: str) -> tuple[list[Checkpoint], bool]:
        """A page of checkpoints, newest first, and whether there are more. ``filters`` are those of
        Store.page_of_checkpoints."""
        after = page.after or None
        last = self.store.checkpoint(after) if after else None
        if after and (last is None or any(getattr(last, name) != value for name, value in filters.items())):
            raise unknown_cursor(after, "a checkpoint of this list")
        return self.store.page_of_checkpoints(after=after, limit=page.limit, **filters)

    async def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``done()``; False if that took too long."""
        deadline = time.monotonic() + seconds
        while not done():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            await self.changes.wait(min(left, 5.0))
        return True


async def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceParts = Annotated[Service, Depends(_service_of)]
"""The type of an endpoint's argument that receives the Service."""


def found(record: Record | None, kind: str, record_id: str) -> Record:
    """``record``, which a client asked for by ``record_id``. Raises RequestError 404 if it is None."""
    if record is None:
        code = f"no_such_{kind}"
        raise refuse(f"{kind}_id", repr(record_id[:64]), f"the id of a {kind}", status=404, code=code)
    return record


def page_of(records: Sequence[Listed], page: PageQuery) -> tuple[Sequence[Listed], bool]:
    """At most ``page.limit`` records after the one with id ``page.after``; and whether there are more. Raises RequestError
    if none has that id."""
    ids = [record.id for record in records]
    if page.after and page.after not in ids:
        raise unknown_cursor(page.after, "the last entry of the page before")
    start = ids.index(page.after) + 1 if page.after else 0
    return records[start : start + page.limit], len(records) > start + page.limit


def unknown_cursor(after: str, of: str) -> RequestError:
    """The refusal of an ``after`` that is not in the list: another page than the asked one would repeat entries."""
    return refuse("after", repr(after[:64]), f"the id of {of}; ask again without it")


def listing(data: Sequence[dict[str, Any]], has_more: bool = False) -> dict[str, Any]:
    """The JSON of one page of a list."""
    return {"object": "list", "data": data, "has_more": has_more}


def model_vocab_size(model_path: Path) -> int | None:
    """Vocabulary of the model folder's config.json, or None."""
    config = _config(model_path)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def model_digest(model_path: Path, serving: Serving) -> str:
    """A digest of the model's config and of how its server turns texts into token ids (``serving``, which has the
    tokenizer's digest): all that gives token ids their meaning. Checkpoints of a model have its digest."""
    digest = hashlib.sha256()
    same = {
        name: value
        for name, value in _config(model_path).items()
        if name not in ("_name_or_path", "transformers_version")
    }
    digest.update(msgspec.json.encode(same, order="sorted"))
    # without the reasons of refusals, which may differ from start to start
    compared = msgspec.structs.replace(serving, chat_refusal="", text_refusal="")
    digest.update(msgspec.json.encode(compared, order="sorted"))
    return digest.hexdigest()


def _config(model_path: Path) -> dict[str, Any]:
    """The model folder's config.json; empty if there is none that can be read."""
    try:
        return msgspec.json.decode((model_path / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, *DECODE_ERRORS):
        return {}
