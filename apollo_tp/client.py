"""A Python client of the trainer's HTTP API: submit samples, wait for the job, read the status. Sync and async.

    from apollo_tp.client import Client, Sample

    with Client("http://127.0.0.1:8300") as client:
        job = client.submit([Sample(prompt_ids=[1, 2], completion_ids=[3], ...)], loss="ppo")
        job = client.wait(job.id)

It needs httpx and msgspec, and none of the trainer's other dependencies. docs/how-to/rewards.md has a whole training loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
import msgspec

from apollo_tp.coordinator.samples.schema import Guard
from apollo_tp.coordinator.samples.schema import SampleBody as Sample
from apollo_tp.errors import DECODE_ERRORS, ApolloTpError, DeadlineError
from apollo_tp.wire.losses import LossConfig, LossName

__all__ = [
    "AsyncClient", "Checkpoint", "Client", "Guard", "Job", "JobError", "Loss", "LossConfig", "NotDoneError", "RefusedError",
    "Sample", "Status",
]  # fmt: skip

Loss = LossName
T = TypeVar("T")
POLL_SECONDS = (0.02, 1.0)
"""Between two looks at a job: at first, and at most."""
LOOK_SECONDS = 0.2
"""Between two looks at a checkpoint."""
ENDED = ("succeeded", "failed", "cancelled")


class JobError(ApolloTpError):
    """A job failed or was cancelled; ``job`` says why."""

    def __init__(self, job: Job) -> None:
        reason = (job.error or {}).get("message", "no reason given")
        super().__init__(f"job {job.id}: got state {job.state} after step {job.step} ({reason}), expected succeeded")
        self.job = job


class NotDoneError(ApolloTpError):
    """A checkpoint could not be written, or not be restored."""


class RefusedError(ApolloTpError):
    """The server refused a request. ``status`` is HTTP's, ``field`` the part of the request that was wrong, if known."""

    def __init__(self, message: str, status: int, field: str | None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Job(msgspec.Struct, kw_only=True):
    """A training job. ``metrics`` are further figures of its last step, such as ``mismatch_kl`` and ``reward_mean``; a value
    that is not finite is None. ``skipped_steps`` is how many steps at its end wrote nothing: its events say why."""

    id: str
    state: str
    step: int
    total_steps: int
    loss: float | None = None
    weight_version: int | None = None
    skipped_steps: int = 0
    metrics: dict[str, float | None] = {}
    guard: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Restore(msgspec.Struct, kw_only=True):
    """The last request to put a checkpoint back."""

    state: str
    weight_version: int | None = None
    seconds: float = 0.0
    paused_seconds: float = 0.0
    error: str = ""


class Checkpoint(msgspec.Struct, kw_only=True):
    """A checkpoint. Of the ``seconds`` that it took, no step could be made for ``stopped_seconds``."""

    id: str
    name: str
    state: str
    path: str = ""
    weight_version: int | None = None
    seconds: float = 0.0
    stopped_seconds: float = 0.0
    restore: Restore | None = None
    error: str = ""


class Trainer(msgspec.Struct, kw_only=True):
    """The trainer's part of the status. ``weight_version`` counts updates of the served weights."""

    connected: bool
    weight_version: int | None = None
    reason: str = ""


class Status(msgspec.Struct, kw_only=True):
    """What the trainer does."""

    trainer: Trainer
    running: Job | None = None


class Options(TypedDict, total=False):
    """Options of a job; docs/reference/http.md explains them."""

    loss: LossName
    loss_config: LossConfig
    epochs: int
    batch_size: int
    learning_rate_scale: float
    seed: int | None
    max_steps: int | None
    validation: Sequence[Sample | dict[str, Any]]
    guard: Guard | None
    metadata: dict[str, str]


class _Scores(msgspec.Struct):
    class Row(msgspec.Struct):
        token_logprobs: list[float | None]

    data: list[Row]


def _encoded(samples: Sequence[Sample | dict[str, Any]], options: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"samples": samples} | options)


def _completions(samples: Sequence[Sample | dict[str, Any]], rows: list[_Scores.Row]) -> list[list[float]]:
    """Of each sample the values of its completion, or of all tokens but the first if it has none; 0 where the weight is
    0."""
    result = []
    for sample, row in zip(samples, rows, strict=True):
        ids = sample.get("completion_ids") if isinstance(sample, dict) else sample.completion_ids
        values = row.token_logprobs[-len(ids) :] if ids else row.token_logprobs[1:]
        result.append([value or 0.0 for value in values])
    return result


def _parsed(answer: httpx.Response, kind: type[T]) -> T:
    if answer.is_error:
        try:
            details = answer.json()["error"]
            message, field = str(details["message"]), details.get("field")
        except (ValueError, KeyError, TypeError):
            message, field = answer.text[:300], None
        raise RefusedError(f"{answer.status_code}: {message}", answer.status_code, field)
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except DECODE_ERRORS as error:
        message = f"{answer.url}: got an answer that is not the trainer's ({error}), expected one; is this its address?"
        raise RefusedError(message, answer.status_code, None) from error


def _options(token: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    # a step can take minutes: only connecting has a short deadline
    return {"headers": headers, "timeout": httpx.Timeout(120, connect=5), "trust_env": False}


def _is_done(checkpoint: Checkpoint, wanted: Checkpoint | Restore | None) -> bool:
    """Whether what was asked of ``checkpoint`` is done. Raises NotDoneError if it failed."""
    if wanted is not None and wanted.state == "failed":
        raise NotDoneError(f"checkpoint {checkpoint.name}: got an error ({wanted.error}), expected it to be done")
    return wanted is not None and wanted.state == "succeeded"


def _late(checkpoint: Checkpoint, seconds: float) -> DeadlineError:
    return DeadlineError(f"checkpoint {checkpoint.name}: not done after {seconds:g} s; it goes on")


def _path(name: str) -> str:
    return f"/checkpoint/{quote(name, safe='')}"


def _is_over(job: Job) -> bool:
    """Raises JobError if it did not succeed."""
    if job.state in ENDED and job.state != "succeeded":
        raise JobError(job)
    return job.state == "succeeded"


class _Waiting:
    """The pauses of one wait. ``next`` is how long to sleep; it raises DeadlineError when the time is over."""

    def __init__(self, job_id: str, seconds: float) -> None:
        self._job_id, self._seconds = job_id, seconds
        self._end, self._pause = time.monotonic() + seconds, POLL_SECONDS[0]

    def next(self, job: Job) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"job {self._job_id}: got state {job.state} at step {job.step} of {job.total_steps} after "
                f"{self._seconds:g} s, expected its end; wait again, or for longer"
            )
        self._pause = min(2 * self._pause, POLL_SECONDS[1])
        return min(left, self._pause)


class Client:
    """``url`` is the coordinator's, or that of a vLLM server with the plugin. Methods raise RefusedError, and httpx's errors
    if nothing answers. Close it, or use it in a ``with`` block."""

    def __init__(self, url: str = "http://127.0.0.1:8300", token: str | None = None) -> None:
        self._http = httpx.Client(base_url=url, transport=httpx.HTTPTransport(retries=2), **_options(token))

    def submit(self, samples: Sequence[Sample | dict[str, Any]], **options: Unpack[Options]) -> Job:
        """Queue a job; returns it as it was stored."""
        return _parsed(self._http.post("/train", content=_encoded(samples, dict(options))), Job)

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return _parsed(self._http.get(f"/train/jobs/{quote(job_id, safe='')}"), Job)

    def wait(self, job_id: str, seconds: float = 600.0) -> Job:
        """The job, once it has succeeded. Raises JobError if it did not, DeadlineError after ``seconds``."""
        waiting = _Waiting(job_id, seconds)
        while not _is_over(job := self.job(job_id)):
            time.sleep(waiting.next(job))
        return job

    def status(self) -> Status:
        """What the trainer does, and the version of the served weights."""
        return _parsed(self._http.get("/train/status"), Status)

    def logprobs(self, samples: Sequence[Sample | dict[str, Any]]) -> list[list[float]]:
        """Log-probabilities (nats) of each sample's completion under the trainer's weights of this moment, at its
        temperature: what a later step may be given as ``reference_logprobs``."""
        answer = self._http.post("/train/score", content=_encoded(samples, {"per_token": True}))
        return _completions(samples, _parsed(answer, _Scores).data)

    def checkpoint(self, seconds: float = 600.0) -> Checkpoint:
        """Write a checkpoint of the served weights; returns it once it is complete. Raises NotDoneError, and DeadlineError
        after ``seconds``."""
        made, end = _parsed(self._http.post("/checkpoint"), Checkpoint), time.monotonic() + seconds
        while not _is_done(made, made):
            if time.monotonic() > end:
                raise _late(made, seconds)
            time.sleep(LOOK_SECONDS)
            made = _parsed(self._http.get(_path(made.id)), Checkpoint)
        return made

    def restore(self, name: str, seconds: float = 600.0) -> Checkpoint:
        """Put the checkpoint of this name or id back into the served memory; returns it once that is done. Raises as
        ``checkpoint``, and RefusedError if there is none."""
        found, end = _parsed(self._http.post(f"{_path(name)}/restore"), Checkpoint), time.monotonic() + seconds
        while not _is_done(found, found.restore):
            if time.monotonic() > end:
                raise _late(found, seconds)
            time.sleep(LOOK_SECONDS)
            found = _parsed(self._http.get(_path(name)), Checkpoint)
        return found

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited."""

    def __init__(self, url: str = "http://127.0.0.1:8300", token: str | None = None) -> None:
        self._http = httpx.AsyncClient(base_url=url, transport=httpx.AsyncHTTPTransport(retries=2), **_options(token))

    async def submit(self, samples: Sequence[Sample | dict[str, Any]], **options: Unpack[Options]) -> Job:
        """See Client."""
        return _parsed(await self._http.post("/train", content=_encoded(samples, dict(options))), Job)

    async def job(self, job_id: str) -> Job:
        """See Client."""
        return _parsed(await self._http.get(f"/train/jobs/{quote(job_id, safe='')}"), Job)

    async def wait(self, job_id: str, seconds: float = 600.0) -> Job:
        """See Client."""
        waiting = _Waiting(job_id, seconds)
        while not _is_over(job := await self.job(job_id)):  # noqa: ASYNC110 - it is over in another process
            await asyncio.sleep(waiting.next(job))
        return job

    async def status(self) -> Status:
        """See Client."""
        return _parsed(await self._http.get("/train/status"), Status)

    async def logprobs(self, samples: Sequence[Sample | dict[str, Any]]) -> list[list[float]]:
        """See Client."""
        answer = await self._http.post("/train/score", content=_encoded(samples, {"per_token": True}))
        return _completions(samples, _parsed(answer, _Scores).data)

    async def checkpoint(self, seconds: float = 600.0) -> Checkpoint:
        """See Client."""
        made, end = _parsed(await self._http.post("/checkpoint"), Checkpoint), time.monotonic() + seconds
        while not _is_done(made, made):
            if time.monotonic() > end:
                raise _late(made, seconds)
            await asyncio.sleep(LOOK_SECONDS)
            made = _parsed(await self._http.get(_path(made.id)), Checkpoint)
        return made

    async def restore(self, name: str, seconds: float = 600.0) -> Checkpoint:
        """See Client."""
        found, end = _parsed(await self._http.post(f"{_path(name)}/restore"), Checkpoint), time.monotonic() + seconds
        while not _is_done(found, found.restore):
            if time.monotonic() > end:
                raise _late(found, seconds)
            await asyncio.sleep(LOOK_SECONDS)
            found = _parsed(await self._http.get(_path(name)), Checkpoint)
        return found

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
