"""The OpenAI fine-tuning routes over our jobs: what an unmodified ``openai`` program sends and expects."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from apollo_tp.coordinator.http.service import Service, idempotency, page, page_of
from apollo_tp.coordinator.jobs.evaluation import Pair
from apollo_tp.coordinator.jobs.job import Event, Job, JobError, JobSpec, State, Truncate, new_job, plan_total_steps
from apollo_tp.coordinator.jobs.scheduler import model_changed
from apollo_tp.coordinator.jobs.store import Checkpoint, StoredFile
from apollo_tp.coordinator.samples.intake import Intake
from apollo_tp.coordinator.samples.sample_file import write_records
from apollo_tp.coordinator.samples.schema import FineTuningBody, Hyperparameters, PreferenceLine, SupervisedLine, decode
from apollo_tp.errors import ApolloTpError, RequestError, refuse
from apollo_tp.wire.commands import Sample

log = logging.getLogger(__name__)

DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
DEFAULT_BETA = 0.1
MAX_REPORTED_LINES = 10


class BadFileError(ApolloTpError):
    """Lines of an uploaded file that cannot be trained on."""

    def __init__(self, param: str, file: StoredFile, problems: list[str], more: int) -> None:
        rest = f"; and {more} more" if more else ""
        super().__init__(f"{param} {file.filename} ({file.id}): " + "; ".join(problems) + rest)
        self.param = param


class FineTuningApi:
    """Handlers of /v1/fine_tuning/jobs, and the validation of files behind them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._validating: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    def routes(self) -> list[Route]:
        """The route table of this surface."""
        base = "/v1/fine_tuning/jobs"
        return [
            Route(base, self.create, methods=["POST"]),
            Route(base, self.list, methods=["GET"]),
            Route(f"{base}/{{job_id}}", self.retrieve, methods=["GET"]),
            Route(f"{base}/{{job_id}}/events", self.events, methods=["GET"]),
            Route(f"{base}/{{job_id}}/checkpoints", self.checkpoints, methods=["GET"]),
            *(
                Route(f"{base}/{{job_id}}/{action}", self._action(action), methods=["POST"])
                for action in ("cancel", "pause", "resume")
            ),
        ]

    def resume_validation(self) -> None:
        """After a restart: validate again what was being validated."""
        service = self._service
        for job in service.store.jobs(State.validating_files):
            if job.model_digest == service.scheduler.model:
                self._start_validation(job)
            else:
                job.state, job.error, job.finished_at = (
                    State.failed,
                    model_changed(service.settings.model_path),
                    time.time(),
                )
                service.store.save_job(job, f"Job failed: {job.error.message}", level="error")

    async def create(self, request: Request) -> Response:
        """Create a fine-tuning job."""
        service, data = self._service, await request.body()
        key = idempotency(request, "/v1/fine_tuning/jobs", data)
        if key and (known := service.store.repeated(*key)):
            return JSONResponse(self.view(service.find(known)))
        body = decode(data, FineTuningBody)
        hello = service.scheduler.link.hello
        names = [*hello.served_model_names, hello.model_path] if hello else [body.model]
        if body.model not in names:
            raise refuse(
                "model", repr(body.model[:80]), f"the served model: {names[0]!r}", status=404, code="model_not_found"
            )
        for name in ("training_file", "validation_file"):
            file_id = getattr(body, name)
            if file_id is not None and service.store.file(file_id) is None:
                raise refuse(name, repr(file_id[:80]), "the id of an uploaded file")
        job = new_job("openai", _spec(body), State.validating_files, service.scheduler.model)
        service.store.add_job(job, max_queued=service.settings.service.max_queued_jobs, idempotency=key)
        self._start_validation(job)
        return JSONResponse(self.view(job))

    # --- validation -----------------------------------------------------------------------------------------------------

    def _start_validation(self, job: Job) -> None:
        task = asyncio.create_task(self._validate(job))
        self._validating.add(task)
        task.add_done_callback(self._validating.discard)

    async def _validate(self, job: Job) -> None:
        store = self._service.store
        store.save_job(job, f"Validating training file: {job.spec.training_file}", type="message")
        folder = store.samples_dir
        error = None
        try:
            async with self._one_at_a_time:
                count = await self._validate_file(job, "training_file", folder / f"{job.id}.train")
                valid = 0
                if job.spec.validation_file:
                    valid = await self._validate_file(job, "validation_file", folder / f"{job.id}.valid")
        except BadFileError as problem:
            error = JobError(code=f"invalid_{problem.param}", message=str(problem), param=problem.param)
        except (ApolloTpError, OSError) as problem:
            error = JobError(code="validation", message=str(problem), param="training_file")
        # a task's edge, as the table of HTTP errors is a request's: otherwise the job would be validated for ever
        except Exception:
            log.exception("job %s could not be validated", job.id)
            message = "internal error; the trainer's log has it"
            error = JobError(code="validation", message=message, param="training_file")
        current = store.job(job.id)
        if current is None or current.state is not State.validating_files:
            store.remove_samples(job.id)
            return  # cancelled meanwhile
        if error is not None:
            job.state, job.error, job.finished_at = State.failed, error, time.time()
            store.save_job(job, f"Job failed: {error.message}", level="error")
            store.remove_samples(job.id)
            return
        job.num_samples, job.num_validation, job.state = count, valid, State.queued
        job.total_steps = plan_total_steps(job.spec, count)
        store.save_job(job, "Files validated, moving job to queued state")
        self._service.scheduler.wake()

    async def _validate_file(self, job: Job, param: str, target: Path) -> int:
        file = self._service.store.file(getattr(job.spec, param))
        if file is None:
            raise RequestError(f"{param}: the file was deleted before it was validated", field=param)
        self._service.check_disk(file.bytes)
        intake = self._service.intake(job.spec.truncate)
        source = self._service.store.file_path(file.id)
        return await asyncio.to_thread(_convert, intake, job.spec.method, param, file, source, target)

    # --- views ----------------------------------------------------------------------------------------------------------

    def view(self, job: Job) -> dict[str, Any]:
        """A FineTuningJob."""
        spec = job.spec
        hyperparameters: dict[str, Any] = {
            "n_epochs": spec.epochs,
            "batch_size": spec.batch_size,
            "learning_rate_multiplier": spec.learning_rate_scale,
        }
        if spec.method == "dpo":
            hyperparameters["beta"] = spec.beta
        left = None
        if self._service.scheduler.running is job:
            left = self._service.scheduler.progress.seconds_left(job.total_steps - job.step)
        error = None
        if job.error is not None:
            error = {"code": job.error.code, "message": job.error.message, "param": job.error.param}
        return {
            "id": job.id,
            "object": "fine_tuning.job",
            "created_at": int(job.created_at),
            "finished_at": int(job.finished_at) if job.finished_at else None,
            "model": spec.model,
            # the served weights are the result: the served model's name is what answers with them
            "fine_tuned_model": self._served_name(spec.model) if job.state is State.succeeded else None,
            "organization_id": "apollo_tp",
            "status": job.state.value,
            "hyperparameters": hyperparameters,
            "method": {"type": spec.method, spec.method: {"hyperparameters": hyperparameters}},
            "training_file": spec.training_file,
            "validation_file": spec.validation_file or None,
            "result_files": [],
            "trained_tokens": job.tokens if job.terminal else None,
            "estimated_finish": int(time.time() + left) if left is not None else None,
            "error": error,
            "seed": spec.seed or 0,
            "metadata": spec.metadata,
            "integrations": [],
            "user_provided_suffix": spec.suffix or None,
        }

    def _served_name(self, model: str) -> str:
        hello = self._service.scheduler.link.hello
        names = hello.served_model_names if hello else []
        return model if model in names or not names else names[0]

    async def list(self, request: Request) -> Response:
        """Fine-tuning jobs, newest first; those that have all of ``metadata``."""
        after, limit = page_of(request)
        metadata = _metadata(request)
        jobs, more = self._service.store.page_of_jobs(after=after, limit=limit, source="openai", metadata=metadata)
        data = [self.view(self._service.find(job.id)) for job in jobs]
        return JSONResponse({"object": "list", "data": data, "has_more": more})

    async def retrieve(self, request: Request) -> Response:
        """One fine-tuning job."""
        return JSONResponse(self.view(self._service.find(request.path_params["job_id"])))

    async def events(self, request: Request) -> Response:
        """Events of a job, newest first."""
        job = self._service.find(request.path_params["job_id"])
        after, limit = page_of(request)
        number = (after or "").removeprefix("ftevent-")
        before = int(number) if number.isascii() and number.isdigit() and len(number) < 19 else None
        events, more = self._service.store.latest_events(job.id, before=before, limit=limit)
        return JSONResponse({"object": "list", "data": [_event_view(event) for event in events], "has_more": more})

    async def checkpoints(self, request: Request) -> Response:
        """Checkpoints of a job, newest first."""
        job = self._service.find(request.path_params["job_id"])
        after, limit = page_of(request)
        found, more = page(self._service.store.checkpoints(job_id=job.id, state="succeeded"), after, limit)
        data = [_checkpoint_view(checkpoint) for checkpoint in found]
        answer = {"object": "list", "data": data, "has_more": more}
        return JSONResponse(
            answer | {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        )

    def _action(self, action: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            job = self._service.act(self._service.find(request.path_params["job_id"]), action)
            return JSONResponse(self.view(job))

        handler.__name__ = f"fine_tuning_{action}"
        handler.__doc__ = f"{action.capitalize()} a fine-tuning job."
        return handler


def _metadata(request: Request) -> dict[str, str]:
    """The query's metadata[KEY]=VALUE."""
    wanted = {}
    for name, value in request.query_params.items():
        if name.partition("[")[0] == "metadata":
            if not (name.startswith("metadata[") and name.endswith("]")):
                raise refuse("metadata", repr(name[:80]), "metadata[KEY]=VALUE")
            wanted[name[9:-1]] = value
    return wanted


def _spec(body: FineTuningBody) -> JobSpec:
    """The job that a request describes, "auto" resolved."""
    method = body.method.type if body.method else "supervised"
    if method not in ("supervised", "dpo"):
        raise refuse("method.type", repr(method[:40]), "'supervised' or 'dpo'")
    options = getattr(body.method, method) if body.method else None
    other = "dpo" if method == "supervised" else "supervised"
    if body.method and getattr(body.method, other) is not None:
        raise refuse(f"method.{other}", "options", f"only method.{method}, as method.type says")
    if options and options.hyperparameters and body.hyperparameters:
        raise refuse("hyperparameters", "a second set", f"those of method.{method}.hyperparameters alone")
    asked = (options.hyperparameters if options else None) or body.hyperparameters or Hyperparameters()

    def resolve(name: str, automatic: float) -> Any:
        value = getattr(asked, name)
        if isinstance(value, str) and value != "auto":
            raise refuse(f"hyperparameters.{name}", repr(value[:40]), "a number or 'auto'")
        return automatic if value == "auto" else value

    return JobSpec(
        method=method,
        epochs=resolve("n_epochs", DEFAULT_EPOCHS),
        batch_size=resolve("batch_size", DEFAULT_BATCH_SIZE),
        learning_rate_scale=float(resolve("learning_rate_multiplier", 1.0)),
        beta=float(resolve("beta", DEFAULT_BETA)),
        seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
        truncate=Truncate.refuse,
        save_at_end=True,
        metadata=body.metadata or {},
        model=body.model,
        suffix=body.suffix or "",
        training_file=body.training_file,
        validation_file=body.validation_file or "",
    )


def _convert(intake: Intake, method: str, param: str, file: StoredFile, source: Path, target: Path) -> int:
    """Check and render every line of a file into ``target``. Raises BadFileError with line numbers and reasons."""
    problems: list[str] = []
    bad = 0

    def records() -> Iterator[Sample | Pair]:
        nonlocal bad
        with open(source, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield from _records(intake, method, line)
                except RequestError as error:
                    bad += 1
                    if len(problems) < MAX_REPORTED_LINES:
                        where = f"{error.field}: " if error.field and not str(error).startswith(error.field) else ""
                        problems.append(f"line {number}: {where}{error}")

    count = write_records(target, records())
    if bad or not count:
        target.unlink()
        raise BadFileError(param, file, problems or ["the file has no lines"], bad - len(problems))
    return count


def _records(intake: Intake, method: str, line: bytes) -> Sequence[Sample | Pair]:
    if method == "dpo":
        return [intake.pair(decode(line, PreferenceLine))]
    return intake.sequences(decode(line, SupervisedLine), "")


def _event_view(event: Event) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.time),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.type == "metrics" else "message",
        "data": event.data,
    }


def _checkpoint_view(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.finished_at or checkpoint.created_at),
        "fine_tuned_model_checkpoint": checkpoint.path,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
    }
