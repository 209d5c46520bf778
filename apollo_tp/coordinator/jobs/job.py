"""The record of a job, its states, the actions that each state allows, and the samples of each of its steps."""

from __future__ import annotations

import functools
import math
import random
import secrets
import time
from enum import Enum

import msgspec

from apollo_tp.config import ServiceConfig
from apollo_tp.coordinator.graders.schema import Grader
from apollo_tp.coordinator.samples.schema import Guard, TrainBody, Truncate
from apollo_tp.errors import RequestError, refuse
from apollo_tp.wire.losses import Loss, complete


class State(Enum):
    """Where a job is in its life; the values are those of OpenAI's fine-tuning jobs."""

    validating_files = "validating_files"
    queued = "queued"
    running = "running"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


TERMINAL = frozenset({State.succeeded, State.failed, State.cancelled})


class JobSpec(msgspec.Struct, kw_only=True):
    """How to train, as the client requested it.

    ``seed`` shuffles the samples of each epoch; None keeps their order. ``beta`` is the inverse temperature of DPO's loss. A
    reinforcement job has ``completions`` of each prompt in a step, and every ``eval_interval`` steps ``eval_samples`` of
    each prompt of its validation file.
    """

    method: str = "supervised"  # or "dpo", "reinforcement"
    epochs: int = 1
    batch_size: int = 8
    learning_rate_scale: float = 1.0
    seed: int | None = None
    max_steps: int | None = None
    truncate: Truncate = Truncate.refuse
    beta: float = 0.1
    loss: Loss = Loss()
    save_at_end: bool = False
    guard: Guard | None = None
    metadata: dict[str, str] = {}
    # set by the OpenAI routes only:
    model: str = ""
    suffix: str = ""
    training_file: str = ""
    validation_file: str = ""
    asked_hyperparameters: dict[str, int | float | str] = {}
    # of method "reinforcement" only:
    grader: Grader | None = None
    completions: int = 8
    eval_interval: int | None = None
    eval_samples: int = 1


class JobError(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a job failed. ``rank`` and ``traceback`` are set when a trainer rank raised."""

    code: str
    message: str
    param: str | None = None
    rank: int | None = None
    traceback: str = ""


class GuardState(msgspec.Struct, kw_only=True):
    """What the guard of a job has found: the number from before the job, the last one (None if it was not finite), after how
    many steps, and what follows from it ("" if it is good enough). ``snapshot`` is the checkpoint of before the job, and
    ``restore_id`` the request that put it back."""

    baseline: float
    value: float | None
    step: int = 0
    verdict: str = ""
    snapshot: str = ""
    restore_id: str = ""


class Job(msgspec.Struct, kw_only=True):
    """One durable job. Times are Unix seconds.

    ``step`` counts its completed optimizer steps, ``tokens`` the tokens of these steps, ``loss_tokens`` those of them with a
    loss weight, and ``skipped_steps`` the steps skipped in a row. ``metrics`` are further figures of the last step; None if
    not finite. ``wanted`` is what a client requested of the running job ("pause", "cancel" or ""); it takes effect at the
    next step. ``resumable`` marks a job that a crash interrupted after ``step`` steps. ``server_life`` identifies the server
    process whose weights were trained, and ``model_digest`` the model that the samples were made for.
    """

    id: str
    source: str  # "train" or "openai"
    spec: JobSpec
    model_digest: str = ""
    state: State
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    num_samples: int = 0
    num_validation: int = 0
    total_steps: int = 0
    step: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    loss: float | None = None
    token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_token_accuracy: float | None = None
    valid_reward: float | None = None
    weight_version: int | None = None
    padding_share: float | None = None
    skipped_steps: int = 0
    metrics: dict[str, float | None] = {}
    training_seconds: float = 0.0
    wanted: str = ""
    resumable: bool = False
    server_life: str = ""
    guard: GuardState | None = None
    error: JobError | None = None

    @property
    def terminal(self) -> bool:
        """True once the job has succeeded, failed or been cancelled: its record does not change any more."""
        return self.state in TERMINAL


class Event(msgspec.Struct, kw_only=True, dict=True):
    """Something that happened to a job. ``id`` increases over all jobs. ``type``: state, metrics, message, checkpoint or
    guard."""

    id: int
    job_id: str
    time: float
    level: str
    type: str
    message: str
    data: dict[str, object]

    @functools.cached_property
    def encoded(self) -> bytes:
        """The event as JSON, made once for all who follow the job."""
        return msgspec.json.encode(self)


class Restore(msgspec.Struct, kw_only=True):
    """A request to put a checkpoint back into the served memory. ``state`` is queued, succeeded or failed; ``reason`` is
    request or guard. Of one whose answer was lost, the seconds are 0. ``lost``: the snapshot in host memory was, and its
    ``fallback`` was restored."""

    id: str
    state: str
    reason: str
    created_at: float
    finished_at: float | None = None
    seconds: float = 0.0
    paused_seconds: float = 0.0
    weight_version: int | None = None
    error: str = ""
    lost: bool = False


class Checkpoint(msgspec.Struct, kw_only=True):
    """A requested or written checkpoint. ``state`` is queued, succeeded or failed; ``reason`` is request, job, idle or
    guard. Of the ``seconds`` that it took, no step could be made for ``stopped_seconds``. ``restore`` is the last request
    to put it back. With ``fallback`` it is a snapshot of a guard in the trainer's memory, in whose place that checkpoint is
    restored if the memory is lost; it has no ``path`` then."""

    id: str
    name: str
    state: str
    reason: str
    created_at: float
    job_id: str = ""
    step: int = 0
    finished_at: float | None = None
    path: str = ""
    fallback: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    stopped_seconds: float = 0.0
    weight_version: int | None = None
    metrics: dict[str, float | None] = {}
    error: str = ""
    restore: Restore | None = None


class StoredFile(msgspec.Struct, kw_only=True):
    """An uploaded file. ``filename`` is the client's name for it: it is displayed, and never used as a path."""

    id: str
    filename: str
    bytes: int
    created_at: float
    purpose: str = "fine-tune"
    status: str = "processed"
    expires_at: float | None = None


def new_job(source: str, spec: JobSpec, state: State, model_digest: str = "") -> Job:
    """A new job with an id of its own. It is not stored."""
    identity = f"{'ftjob' if source == 'openai' else 'job'}-{secrets.token_hex(12)}"
    return Job(id=identity, source=source, spec=spec, state=state, model_digest=model_digest, created_at=time.time())


def spec_of(body: TrainBody) -> JobSpec:
    """The job specification of a POST /train body."""
    return JobSpec(
        epochs=body.epochs,
        batch_size=body.batch_size,
        learning_rate_scale=body.learning_rate_scale,
        seed=body.seed,
        max_steps=body.max_steps,
        truncate=body.truncate,
        loss=complete(body.loss, body.loss_config),
        guard=body.guard,
        metadata=body.metadata,
    )


def check_guard(guard: Guard | None, has_validation: bool, service: ServiceConfig) -> None:
    """Raise RequestError if there is nothing that the guard could measure."""
    if guard is None:
        return
    if guard.measure == "command" and not service.guard_command:
        raise refuse(
            "guard.measure", "'command'", "'validation'; the trainer's options allow no command: service.guard_command"
        )
    if guard.measure == "validation" and not has_validation:
        raise refuse(
            "guard", "a guard of the validation loss without validation samples", "'validation', or a validation file"
        )
    if guard.measure == "validation" and guard.higher_is_better:
        raise refuse("guard.higher_is_better", "true for a loss", "false, or a command")


def plan_total_steps(spec: JobSpec, num_samples: int) -> int:
    """Number of optimizer steps of the whole job. The last batch of an epoch may be smaller than the others."""
    steps = spec.epochs * math.ceil(num_samples / spec.batch_size)
    return steps if spec.max_steps is None else min(steps, spec.max_steps)


def model_changed(model_path: str) -> JobError:
    """The error of a job that was queued while the served model was replaced by another."""
    message = (
        f"got the server of {model_path}, expected the model that this job's samples were made for: its configuration, "
        "tokenizer or chat template was another. Start the job again"
    )
    return JobError(code="model_changed", message=message)


def batch_indices(spec: JobSpec, num_samples: int, step: int) -> list[int]:
    """Indices of the samples of step ``step`` (from 1). The same in every process: a resumed job depends on it."""
    per_epoch = math.ceil(num_samples / spec.batch_size)
    epoch, position = divmod(step - 1, per_epoch)
    order = _epoch_order(num_samples, spec.seed, epoch)
    return list(order[position * spec.batch_size : (position + 1) * spec.batch_size])


@functools.lru_cache(maxsize=4)
def _epoch_order(num_samples: int, seed: int | None, epoch: int) -> list[int]:
    order = list(range(num_samples))
    if seed is not None:
        # random.Random is specified to give the same sequence for the same string seed on every Python 3
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


_ALLOWED = {
    "cancel": {State.validating_files, State.queued, State.running, State.paused},
    "pause": {State.queued, State.running},
    "resume": {State.paused},
}


def check_action(job: Job, action: str) -> None:
    """Raise RequestError (409) if a job in this state cannot be cancelled, paused or resumed."""
    if action == "resume" and job.wanted == "pause":
        return  # the pause has not taken effect yet, so it can be withdrawn
    if job.state in _ALLOWED[action] and not (job.wanted == "cancel" and action != "cancel"):
        return
    state = f"{job.state.value}, being cancelled" if job.wanted == "cancel" else job.state.value
    raise RequestError(
        f"job {job.id} cannot {action}: it is {state}, expected one of "
        f"{sorted(state.value for state in _ALLOWED[action])}",
        field="state",
        got=state,
        expected=" | ".join(sorted(state.value for state in _ALLOWED[action])),
        status=409,
        code="job_state",
    )
