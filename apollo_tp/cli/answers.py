"""What the coordinator answers, as far as this client reads it, and the two ways in which an answer fails."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from msgspec import Meta, Struct, ValidationError, convert, json

from apollo_tp.errors import DECODE_ERRORS

T = TypeVar("T")


class RefusedError(Exception):
    """The request was refused, by the coordinator or here, before it was sent. ``field``: which part, where it is known."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnreachableError(Exception):
    """Nothing answers at the address, or another program than a coordinator does."""


class Job(Struct):
    """A training job. ``loss`` in nats per token; a job of the status's queue has none."""

    id: str
    state: str
    step: int
    total_steps: int
    loss: float | None = None
    tokens: int = 0
    wanted: str | None = None
    seconds_left: float | None = None
    tokens_per_second: float | None = None

    @property
    def loss_text(self) -> str:
        """The loss as the end of a line; empty without one."""
        return "" if self.loss is None else f", loss {self.loss:.4f}"


class Trainer(Struct):
    """The trainer's part of the status; most fields are missing while it is not connected."""

    connected: bool
    weight_version: int | None
    reason: str | None = None
    model: str = ""
    num_ranks: int = 0
    optimizer: str = ""
    num_replicas: int = 1
    replicas: list[dict[str, Any]] = []


class ConnectedTrainer(Struct):
    """The fields of that part from which samples for the trainer are made."""

    served_model_names: Annotated[list[str], Meta(min_length=1)]
    vocab_size: Annotated[int, Meta(ge=2)]
    max_sequence_tokens: int
    attention_window: int


class PlanChoice(Struct):
    """A choice of the trainer's options, and the bytes that it takes on each GPU, by part."""

    overrides: list[str]
    bytes: dict[str, int]
    total: int
    fits: bool
    largest_micro_batch_tokens: int
    tokens_per_second: float | None


class Plan(Struct):
    """What `apollo-tp plan` found; ``overrides`` and ``gpu_memory_utilization`` are those of the first choice that fits."""

    model: str
    gpus: int
    gpu: str
    bytes_per_gpu: int
    tensor_parallel_size: int
    tokens: int
    length: int
    concurrency: int
    num_parameters: int
    fits: bool
    overrides: list[str] | None
    gpu_memory_utilization: float | None
    choices: list[PlanChoice]
    sources: str


class Status(Struct):
    """Answer of ``GET /train/status``."""

    trainer: Trainer
    running: Job | None
    queue: list[Job]
    unsaved: bool


class Restore(Struct):
    """The last request to put a checkpoint back."""

    state: str
    seconds: float = 0.0
    paused_seconds: float = 0.0
    weight_version: int | None = None
    error: str = ""


class Checkpoint(Struct):
    """Answer of ``/checkpoint``."""

    id: str
    state: str
    name: str = ""
    path: str | None = None
    error: str | None = None
    restore: Restore | None = None


class PushedFile(Struct):
    """A file by its path in the folder, and in the repository."""

    path: str
    bytes: int


class Push(Struct):
    """What `apollo-tp push` uploaded, or would upload (then without ``url``); ``removed``: weights of earlier uploads."""

    folder: str
    repo_id: str
    revision: str
    files: list[PushedFile]
    bytes: int
    url: str | None = None
    removed: list[str] = []


class Event(Struct):
    """One event of a job."""

    id: int
    type: str
    level: str
    message: str
    data: dict[str, Any]


class Page(Struct, Generic[T]):
    """A list, or one page of it."""

    data: list[T]
    has_more: bool = False


class ShownSample(Struct):
    """A sample of a dry run: token ids, loss weights, and the tokens as text if there is a tokenizer; equally long."""

    token_ids: list[int]
    weights: list[float]
    tokens: list[str] | None = None


class DryRun(Struct):
    """Answer of ``POST /train?dry_run=true``. ``converted``: how many samples were converted, by their format."""

    samples: list[ShownSample]
    num_tokens: int
    num_loss_tokens: int
    total_steps: int
    converted: dict[str, int] = {}


class Score(Struct):
    """A sample's log-probability in nats; None if it is not finite."""

    logprob: float | None


class Scores(Struct):
    """Answer of ``POST /train/score``, in the order of the samples."""

    weight_version: int | None
    data: list[Score]


def parse(content: bytes | str, source: str) -> Any:
    """JSON as builtins. Raises UnreachableError, naming ``source``, for anything else."""
    try:
        return json.decode(content)
    except DECODE_ERRORS as error:
        raise _not_a_coordinator(source, error) from error


def read(answer: object, kind: type[T], source: str = "the answer") -> T:
    """``answer``, a result of ``parse``, as a ``kind``. Raises UnreachableError, naming ``source``, if it does not fit."""
    try:
        return convert(answer, kind)
    except ValidationError as error:
        raise _not_a_coordinator(source, error) from error


def _not_a_coordinator(source: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"{source}: got {error}, expected the JSON of a coordinator of this version; see --url")
