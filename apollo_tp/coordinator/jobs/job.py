"""The record of a job, the states it goes through, and which samples each of its steps trains on."""

from __future__ import annotations

import functools
import math
import random
import secrets
import time
from enum import Enum

import msgspec

from apollo_tp.errors import RequestError


class State(Enum):
    validating_files = "validating_files"
    queued = "queued"
    running = "running"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


TERMINAL = frozenset({State.succeeded, State.failed, State.cancelled})


class Truncate(Enum):
    refuse = "refuse"
    left = "left"
    right = "right"


class JobSpec(msgspec.Struct, kw_only=True):
    """What was asked for. ``seed`` None keeps the order of the samples; ``beta`` is DPO's inverse temperature."""

    method: str = "supervised"  # or "dpo"
    epochs: int = 1
    batch_size: int = 8
    learning_rate_scale: float = 1.0
    seed: int | None = None
    max_steps: int | None = None
    truncate: Truncate = Truncate.refuse
    beta: float = 0.1
    save_at_end: bool = False
    metadata: dict[str, str] = {}
    # of the OpenAI routes:
    model: str = ""
    suffix: str = ""
    training_file: str = ""
    validation_file: str = ""
    asked_hyperparameters: dict[str, int | float | str] = {}


class JobError(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a job failed. ``rank`` and ``traceback`` are set when a trainer rank raised."""

    code: str
    message: str
    param: str | None = None
    rank: int | None = None
    traceback: str = ""


class Job(msgspec.Struct, kw_only=True):
    """One durable job. ``step`` counts completed optimizer steps; times are Unix seconds; ``tokens`` were trained on.

    ``wanted`` is what a client asked of a running job ("pause", "cancel" or ""): it takes effect at the next step.
    ``resumable`` marks a queued job that was interrupted by a crash after ``step`` steps. ``model_digest`` says which model
    its samples are made for.
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
    weight_version: int | None = None
    padding_share: float | None = None
    skipped_steps: int = 0
    training_seconds: float = 0.0
    wanted: str = ""
    resumable: bool = False
    server_life: str = ""
    error: JobError | None = None

    @property
    def terminal(self) -> bool:
        """True once nothing will change any more."""
        return self.state in TERMINAL


class Event(msgspec.Struct, kw_only=True):
    """Something that happened to a job. ``id`` grows over all jobs; ``type``: state, metrics, message, checkpoint."""

    id: int
    job_id: str
    time: float
    level: str
    type: str
    message: str
    data: dict[str, object]


def new_job(source: str, spec: JobSpec, state: State, model_digest: str = "") -> Job:
    """A job that is not stored yet."""
    identity = f"{'ftjob' if source == 'openai' else 'job'}-{secrets.token_hex(12)}"
    return Job(id=identity, source=source, spec=spec, state=state, model_digest=model_digest, created_at=time.time())


def plan_total_steps(spec: JobSpec, num_samples: int) -> int:
    """Optimizer steps of the whole job. An epoch's last batch may be smaller than the others."""
    steps = spec.epochs * math.ceil(num_samples / spec.batch_size)
    return steps if spec.max_steps is None else min(steps, spec.max_steps)


def batch_indices(spec: JobSpec, num_samples: int, step: int) -> list[int]:
    """Samples of step ``step`` (from 1). The same in any process: resuming rests on it."""
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
        return  # the pause has not taken effect yet: withdrawing it is fine
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
