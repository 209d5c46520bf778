"""Validation of the files of a fine-tuning job: each line is checked and rendered before the job is queued."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apollo_tp.coordinator.graders.schema import Grader, check_item
from apollo_tp.coordinator.http.service import Service
from apollo_tp.coordinator.jobs.job import Job, JobError, State, StoredFile, model_changed, plan_total_steps
from apollo_tp.coordinator.samples.forms import read_line
from apollo_tp.coordinator.samples.intake import Intake
from apollo_tp.coordinator.samples.lines import numbered_lines
from apollo_tp.coordinator.samples.sample_file import Pair, Prompt, write_records
from apollo_tp.coordinator.samples.schema import PreferenceLine, PromptLine, SampleBody, decode
from apollo_tp.errors import ApolloTpError, RequestError
from apollo_tp.wire.commands import Sample

log = logging.getLogger(__name__)

MAX_REPORTED_LINES = 10
LANES = (2**20, 32 * 2**20, math.inf)
"""Largest files, in bytes, of the lanes in which files are validated one after the other."""


class BadFileError(ApolloTpError):
    """Lines of an uploaded file that cannot be trained on."""

    def __init__(self, param: str, file: StoredFile, problems: list[str], more: int) -> None:
        rest = f"; and {more} more" if more else ""
        super().__init__(f"{param} {file.filename} ({file.id}): " + "; ".join(problems) + rest)
        self.param = param


class FileValidation:
    """Validates the files of jobs in state validating_files, each on a thread. A file waits only for files of about its own
    size: one line is not behind 200 MB. A job that is cancelled meanwhile ends at its next line."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self._lanes = [(size, asyncio.Lock()) for size in LANES]
        self._threads = ThreadPoolExecutor(len(LANES), "validation")
        self._stopped = False

    def resume(self) -> None:
        """After a restart: validate again what was being validated."""
        service = self._service
        for job in service.store.jobs(State.validating_files):
            if job.model_digest == service.scheduler.model:
                self.start(job)
            else:
                self._fail(job, model_changed(service.settings.model_path))

    def start(self, job: Job) -> None:
        """Validate in the background. The job is then queued, or failed with the lines that are wrong."""
        task = asyncio.create_task(self._validate(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """End all validation at the next lines. The next start begins it again."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    async def _validate(self, job: Job) -> None:
        store = self._service.store
        store.save_job(job, f"Validating training file: {job.spec.training_file}", type="message")
        folder, error, count, valid = store.samples_dir, None, 0, 0
        try:
            async with self._lane(job):
                count = await self._validate_file(job, "training_file", folder / f"{job.id}.train")
                if job.spec.validation_file:
                    valid = await self._validate_file(job, "validation_file", folder / f"{job.id}.valid")
        except BadFileError as problem:
            error = JobError(code=f"invalid_{problem.param}", message=str(problem), param=problem.param)
        except (ApolloTpError, OSError) as problem:
            error = JobError(code="validation", message=str(problem), param="training_file")
        except Exception:  # nobody awaits this task: otherwise the job would stay in state validating_files for ever
            log.exception("job %s could not be validated", job.id)
            message = "internal error; the trainer's log has it"
            error = JobError(code="validation", message=message, param="training_file")
        if job.state is not State.validating_files:  # cancelled meanwhile, and its samples may be newer than that
            await store.stored()
            await store.in_thread(lambda _: store.disk.remove_samples(job.id))
        elif error is not None:
            self._fail(job, error)
        else:
            job.num_samples, job.num_validation, job.state = count, valid, State.queued
            job.total_steps = plan_total_steps(job.spec, count)
            await store.save_job(job, "Files validated, moving job to queued state")
            self._service.scheduler.wake()

    def _fail(self, job: Job, error: JobError) -> None:
        job.state, job.error, job.finished_at = State.failed, error, time.time()
        self._service.store.save_job(job, f"Job failed: {error.message}", level="error")

    def _lane(self, job: Job) -> asyncio.Lock:
        files = [self._service.store.file(name) for name in (job.spec.training_file, job.spec.validation_file)]
        size = sum(file.bytes for file in files if file is not None)
        return next(lock for limit, lock in self._lanes if size <= limit)

    async def _validate_file(self, job: Job, param: str, target: Path) -> int:
        service = self._service
        file = service.store.file(getattr(job.spec, param))
        if file is None:
            raise RequestError(f"{param}: the file was deleted before it was validated", field=param)
        service.check_disk(file.bytes)
        intake = service.intake(job.spec.truncate, lambda: self._stopped or job.state is not State.validating_files)
        source = service.store.file_path(file.id)
        convert = functools.partial(_convert, intake, job.spec.method, job.spec.grader, param, file, source, target)
        count = await asyncio.get_running_loop().run_in_executor(self._threads, convert)
        service.store.disk.count(target)
        return count


def _convert(
    intake: Intake, method: str, grader: Grader | None, param: str, file: StoredFile, source: Path, target: Path
) -> int:
    """Check and render every line of a file into ``target``. Raises BadFileError with line numbers and reasons."""
    problems: list[str] = []
    bad = 0

    def records() -> Iterator[Sample | Pair | Prompt]:
        nonlocal bad
        with open(source, "rb") as lines:
            for number, line in numbered_lines(lines):
                intake.check_wanted()
                try:
                    yield from _records(intake, method, grader, line)
                except RequestError as error:
                    bad += 1
                    if len(problems) < MAX_REPORTED_LINES:
                        where = f"{error.field}: " if error.field and not str(error).startswith(error.field) else ""
                        problems.append(f"line {number}: {where}{error}")

    try:
        count = write_records(target, records())
    except RequestError as error:  # the file is of another kind, or has a line that is too long
        raise BadFileError(param, file, [*problems, str(error)], bad - len(problems)) from error
    if bad or not count:
        target.unlink()
        raise BadFileError(param, file, problems or ["the file has no lines"], bad - len(problems))
    return count


def _records(intake: Intake, method: str, grader: Grader | None, line: bytes) -> Sequence[Sample | Pair | Prompt]:
    if method == "dpo":
        return [intake.pair(read_line(line, PreferenceLine))]
    if grader is not None:
        item = decode(line, dict[str, Any])
        check_item(grader, item)
        return [intake.prompt(read_line(line, PromptLine), item)]
    return intake.sequences(read_line(line, SampleBody), "")
