"""What every group of routes shares: the parts of the service, and how parameters of a request are read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from apollo_tp.coordinator.jobs.job import Job, State, Truncate, check_action
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.store import Changes, Checkpoint, Store, StoredFile
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.settings import Settings
from apollo_tp.errors import RequestError, refuse
from apollo_tp.shards.serving import Serving

MAX_PAGE = 100
Identified = TypeVar("Identified", Checkpoint, StoredFile)


@dataclass
class Service:
    """The parts that every route needs. ``model_vocab_size`` is the model folder's, until rank 0 has said its own.
    ``renderer`` is a reason where there is none."""

    settings: Settings
    store: Store
    scheduler: Scheduler
    changes: Changes
    renderer: Renderer | str
    model_vocab_size: int | None

    def intake(self, truncate: Truncate) -> Intake:
        """Checks and renders samples under the limits of this moment."""
        hello = self.scheduler.link.hello
        if hello is not None:
            return Intake(self.renderer, Limits(hello.vocab_size, hello.max_sequence_tokens), truncate)
        return Intake(self.renderer, Limits(self.model_vocab_size, self.settings.max_sequence_tokens), truncate)

    def find(self, job_id: str) -> Job:
        """The job of this id. Raises RequestError 404."""
        job = self.scheduler.live(job_id)
        if job is None:
            raise RequestError(f"got job {job_id[:64]!r}, expected the id of a job", field="job_id", got=job_id[:64],
                               expected="the id of a job", status=404, code="no_such_job")  # fmt: skip
        return job

    def check_disk(self, more: int) -> None:
        """Raise RequestError 413 if ``more`` bytes would exceed the quota."""
        limit = self.settings.service.max_state_bytes
        if (used := self.store.used_bytes()) + more > limit:
            raise refuse("body", f"{more} bytes beside {used} in use", f"at most {limit} together; delete files",
                         status=413, code="disk_quota")  # fmt: skip

    def act(self, job: Job, action: str) -> Job:
        """Cancel, pause or resume. A running job takes it at its next step. Raises RequestError 409."""
        if job.state is State.cancelled and action == "cancel":
            return job
        check_action(job, action)
        if job.state is State.running:
            job.wanted = "" if action == "resume" else action
            message = "The pause is withdrawn" if action == "resume" else f"Will {action} after the steps in flight"
            self.store.save_job(job, message)
            return job
        if action == "cancel":
            job.state, job.finished_at = State.cancelled, time.time()
        else:
            job.state = State.paused if action == "pause" else State.queued
        self.store.save_job(job, f"Job {job.state.value}")
        if job.terminal:
            self.store.remove_samples(job.id)
        self.scheduler.wake()
        return job

    async def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``done()``; False if that took too long."""
        deadline = time.monotonic() + seconds
        while not done():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            await self.changes.wait(min(left, 5.0))
        return True


def flag(request: Request, name: str) -> bool:
    """A boolean query parameter. Raises RequestError for anything but true and false."""
    value = request.query_params.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise refuse(name, repr(value[:40]), "true or false")
    return value in ("true", "1")


def choice(request: Request, name: str, *values: str) -> str:
    """A query parameter that is one of ``values``, the first if absent. Raises RequestError for any other."""
    value = request.query_params.get(name) or values[0]
    if value not in values:
        raise refuse(name, repr(value[:40]), " or ".join(map(repr, values)))
    return value


def whole(text: str, name: str, least: int = 0, most: int = 2**62) -> int:
    """A whole number from a client. Raises RequestError naming ``name``."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise refuse(name, repr(text[:40]), f"a whole number from {least} to {most}")
    return int(text)


def page_of(request: Request, most: int = MAX_PAGE, usual: int = 20) -> tuple[str | None, int]:
    """``after`` and ``limit`` of a list request."""
    limit = whole(request.query_params.get("limit") or str(usual), "limit", 1, most)
    return request.query_params.get("after") or None, limit


def page(found: Sequence[Identified], after: str | None, limit: int) -> tuple[Sequence[Identified], bool]:
    """Those behind the one with id ``after``, ``limit`` at most; and whether there are more."""
    ids = [each.id for each in found]
    start = ids.index(after) + 1 if after in ids else 0
    return found[start : start + limit], len(found) > start + limit


def idempotency(request: Request, route: str, data: bytes) -> tuple[str, str, str] | None:
    """Route, Idempotency-Key and digest of a request that carries such a key."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= 255:
        raise refuse("Idempotency-Key", f"{len(key)} characters", "1 to 255")
    return route, key, hashlib.sha256(data).hexdigest()


def model_vocab_size(model_path: Path) -> int | None:
    """Vocabulary of the model folder's config.json, or None."""
    config = _config(model_path)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def model_digest(model_path: Path, serving: Serving) -> str:
    """What decides the meaning of token ids, and which model they are for: a checkpoint of a model has its digest.
    ``serving`` is how the server turns texts into token ids; it has the tokenizer's own digest."""
    digest = hashlib.sha256()
    same = {
        name: value
        for name, value in _config(model_path).items()
        if name not in ("_name_or_path", "transformers_version")
    }
    digest.update(msgspec.json.encode(same, order="sorted"))
    # not why it refuses texts or conversations, which may be another error each time
    told = msgspec.structs.replace(serving, chat_refusal="", text_refusal="")
    digest.update(msgspec.json.encode(told, order="sorted"))
    return digest.hexdigest()


def _config(model_path: Path) -> dict[str, Any]:
    """The model folder's config.json; empty if there is none that can be read."""
    try:
        return msgspec.json.decode((model_path / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return {}
