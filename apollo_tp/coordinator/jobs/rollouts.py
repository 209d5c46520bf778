"""Reinforcement jobs: completions of the served model for the prompts of a step, their grades, and the samples of the step.

The samples of a step are stored before the step is sent. After a crash the same ones are sent again, unless the step was
completed, or the weights have changed since.
"""

from __future__ import annotations

import asyncio
import functools
import math
import statistics
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from apollo_tp.coordinator.graders.clients import api_client
from apollo_tp.coordinator.graders.grading import Grade, Grading, open_grading
from apollo_tp.coordinator.graders.schema import Grader
from apollo_tp.coordinator.jobs.evaluation import InThread
from apollo_tp.coordinator.jobs.job import Job, batch_indices
from apollo_tp.coordinator.jobs.rank_link import RankLink, RanksGoneError
from apollo_tp.coordinator.jobs.sampling import Completion, SamplingError, sample
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.sample_file import Prompt, SamplesError, read_records, write_records
from apollo_tp.coordinator.samples.schema import SampleBody, TrainBody, Truncate
from apollo_tp.coordinator.settings import Settings
from apollo_tp.errors import DeadlineError
from apollo_tp.wire import commands

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
POLL_SECONDS = 0.2
CONCURRENT_PROMPTS, CONCURRENT_GRADES = 32, 32
SHOWN, SHOWN_CHARS, SHOWN_ERRORS = 4, 500, 3
"""Completions in the event of a step, characters of each, and errors of graders."""


class Batch(msgspec.Struct, frozen=True):
    """The samples of a step, as they were sampled from the weights of ``weight_version``."""

    step: int
    weight_version: int
    samples: list[commands.Sample]


@dataclass(frozen=True)
class Graded:
    """A completion for a prompt; ``index`` counts the prompts of its step."""

    index: int
    prompt: Prompt
    completion: Completion
    grade: Grade


class Rollouts:
    """Samples and grades for the running job. ``busy`` while it does: the ranks have nothing to do then."""

    def __init__(self, settings: Settings, store: Store, link: RankLink, in_thread: InThread[Any]) -> None:
        self._settings, self._store, self._link, self._in_thread = settings, store, link, in_thread
        self.busy = False

    async def batch(self, job: Job, step: int) -> list[commands.Sample] | None:
        """The samples of a step: sampled now, or those that were stored for it. None if a client asked to cancel or pause
        the job. Raises SamplingError, DeadlineError and RanksGoneError."""
        path = self._store.samples_dir / f"{job.id}.batch"
        version = self._version()
        stored: Batch | None = await self._in_thread(functools.partial(_stored, path))
        if stored is not None and (stored.step, stored.weight_version) == (step, version):
            self._store.save_job(job, f"Step {step}: the completions that were sampled before are used", type="message")
            return stored.samples
        indices = batch_indices(job.spec, job.num_samples, step)
        graded = await self._while_wanted(job, self._graded(job, "train", indices, job.spec.completions))
        if graded is None:
            return None
        samples: list[commands.Sample] = await self._in_thread(functools.partial(self._samples, job, graded, version))
        await self._in_thread(functools.partial(write_records, path, [Batch(step, version, samples)]))
        self._store.disk.count(path)
        self._report(job, step, graded)
        return samples

    async def validate(self, job: Job) -> list[Graded] | None:
        """Graded completions for all prompts of the validation file; None and errors as ``batch``."""
        work = self._graded(job, "valid", range(job.num_validation), job.spec.eval_samples)
        return await self._while_wanted(job, work)

    def _version(self) -> int:
        if not self._link.connected or self._link.weight_version is None:
            raise RanksGoneError(self._link.gone_reason)
        return self._link.weight_version

    async def _while_wanted(self, job: Job, work: Coroutine[Any, Any, T]) -> T | None:
        """The value of ``work``, which ends when a client asks to cancel or pause the job."""
        task, self.busy = asyncio.create_task(work), True
        try:
            async with asyncio.timeout(seconds := self._settings.rl.sampling_seconds):
                while not job.wanted:
                    done, _ = await asyncio.wait({task}, timeout=POLL_SECONDS)
                    if done:
                        return task.result()
        except TimeoutError:
            raise DeadlineError(f"the completions and grades of a step: got not all within {seconds:g} s, expected them; "
                                "ask for shorter or fewer ones, or set rl.sampling_seconds") from None  # fmt: skip
        except SamplingError as error:
            self._version()  # the server may have gone with the trainer: then the job is interrupted, and has not failed
            raise error
        finally:
            self.busy = False
            task.cancel()
            await asyncio.wait({task})
        return None

    async def _graded(self, job: Job, part: str, indices: Sequence[int], count: int) -> list[Graded]:
        path = self._store.samples_dir / f"{job.id}.{part}"
        prompts: list[Prompt] = await self._in_thread(functools.partial(read_records, path, indices, Prompt))
        rl, hello = self._settings.rl, self._link.hello
        assert job.spec.grader is not None
        if hello is None:
            raise RanksGoneError(self._link.gone_reason)
        url = self._settings.service.server_url
        if url is None:
            raise SamplingError("service.server_url is not set: expected the address of the server that is trained")
        names, limit = hello.served_model_names or [hello.model_path], hello.max_sequence_tokens
        async with (
            api_client(url, rl.server_key_file, rl.sampling_seconds) as server,
            open_grading(rl) as grading,
        ):
            asking = _Asking(server, grading, job.spec.grader, count, names[0], f"apollo_tp-{self._version()}")
            lengths = [min(rl.max_completion_tokens, limit - len(prompt.token_ids)) for prompt in prompts]
            work = [asking.graded(*each) for each in zip(range(len(prompts)), prompts, lengths, strict=True)]
            return [each for group in await _all(work) for each in group]

    def _samples(self, job: Job, graded: list[Graded], version: int) -> list[commands.Sample]:
        """The step's samples, made as those of POST /train. Completions without a grade are left out, and prompts with fewer
        than two completions that have one. Raises SamplingError if nothing is left."""
        hello = self._link.hello
        assert hello is not None
        counts: dict[int, int] = {}
        for each in graded:
            counts[each.index] = counts.get(each.index, 0) + (each.grade.reward is not None)
        bodies = [
            SampleBody(
                prompt_ids=each.prompt.token_ids, completion_ids=each.completion.token_ids,
                sampling_logprobs=each.completion.logprobs, reward=each.grade.reward, group=each.index,
                weight_version=version,
            )
            for each in graded
            if each.grade.reward is not None and counts[each.index] > 1
        ]  # fmt: skip
        if not bodies:
            errors = next(
                (each.grade.error for each in graded if each.grade.error), "each prompt has one graded completion"
            )
            raise SamplingError(
                f"got no graded completion of {len(graded)} ({errors}), expected at least two of a prompt"
            )
        intake = Intake("", Limits(hello.vocab_size, hello.max_sequence_tokens), Truncate.refuse)
        loss = job.spec.loss
        return list(intake.train_samples(TrainBody(loss=loss.name, loss_config=loss.config), bodies))

    def _report(self, job: Job, step: int, graded: list[Graded]) -> None:
        data = {"step": step, "total_steps": job.total_steps} | summary(graded)
        mean = "no reward" if data["reward_mean"] is None else f"mean reward {data['reward_mean']:.3f}"
        message = f"Step {step}/{job.total_steps}: {len(graded)} completions sampled, {mean}"
        if failed := data["ungraded"]:
            message += f"; {failed} could not be graded: {next(iter(data['grader_errors']))}"
        self._store.save_job(job, message, type="message", level="warn" if failed else "info", data=data)


class _Asking:
    """Asks for ``count`` completions of each prompt and grades them, not too many at once. Entries of vLLM's prefix cache
    with another ``salt``, those of earlier weights, are not used."""

    def __init__(
        self, server: httpx.AsyncClient, grading: Grading, grader: Grader, count: int, model: str, salt: str
    ) -> None:
        self._server, self._grading, self._grader, self._count = server, grading, grader, count
        self._options = {"model": model, "cache_salt": salt}
        self._sampling, self._scoring = asyncio.Semaphore(CONCURRENT_PROMPTS), asyncio.Semaphore(CONCURRENT_GRADES)

    async def graded(self, index: int, prompt: Prompt, max_tokens: int) -> list[Graded]:
        async with self._sampling:
            options = self._options | {"max_tokens": max_tokens}
            completions = await sample(self._server, prompt.token_ids, self._count, options)
        return await _all([self._grade(index, prompt, completion) for completion in completions])

    async def _grade(self, index: int, prompt: Prompt, completion: Completion) -> Graded:
        async with self._scoring:
            grade = await self._grading.grade(self._grader, prompt.item, completion.text)
        return Graded(index, prompt, completion, grade)


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The values of all; the first error cancels the others, and is raised."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _stored(path: Path) -> Batch | None:
    """The batch that was stored last, if there is one that can be read."""
    try:
        return read_records(path, [0], Batch)[0]
    except (FileNotFoundError, SamplesError):
        return None


def summary(graded: list[Graded]) -> dict[str, Any]:
    """What an event says of completions: rewards, scores of the parts of a grader, some examples, and what failed."""
    rewards = [each.grade.reward for each in graded if each.grade.reward is not None]
    errors: dict[str, int] = {}
    for each in graded:
        if each.grade.error:
            errors[each.grade.error[:200]] = errors.get(each.grade.error[:200], 0) + 1
    names = {name for each in graded for name in each.grade.scores}
    scores = {n: statistics.mean(g.grade.scores[n] for g in graded if n in g.grade.scores) for n in sorted(names)}
    shown = graded[:: max(1, math.ceil(len(graded) / SHOWN))]
    return {
        "completions": len(graded),
        "reward_mean": statistics.mean(rewards) if rewards else None,
        "reward_min": min(rewards, default=None),
        "reward_max": max(rewards, default=None),
        "scores": scores,
        "completion_tokens_mean": statistics.mean(len(each.completion.token_ids) for each in graded),
        "ungraded": sum(errors.values()),
        "grader_errors": dict(sorted(errors.items(), key=lambda item: -item[1])[:SHOWN_ERRORS]),
        "samples": [
            {
                "prompt": each.prompt.last_message[-SHOWN_CHARS:],
                "completion": each.completion.text[:SHOWN_CHARS],
                "reward": each.grade.reward,
            }
            for each in shown
        ],
    }
