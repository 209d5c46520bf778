"""Bodies of the OpenAI routes as msgspec structs, and the job that a fine-tuning body describes."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_tp.coordinator.jobs.job import JobSpec
from apollo_tp.coordinator.samples.schema import Guard, Metadata
from apollo_tp.errors import refuse

DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
DEFAULT_BETA = 0.1
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 24 * 3600
METHODS = ("supervised", "dpo")


class Hyperparameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Numbers, or "auto": 3 epochs, batches of 8, the configured learning rate, beta 0.1. Null is "auto"."""

    n_epochs: Annotated[int, Meta(ge=1, le=10_000)] | str | None = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=4096)] | str | None = "auto"
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=1000)] | str | None = "auto"
    beta: Annotated[float, Meta(gt=0, le=100)] | str | None = "auto"


class MethodOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of one method."""

    hyperparameters: Hyperparameters | None = None


class Method(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to train. Reinforcement is not offered: ``reinforcement`` must be null."""

    type: str = "supervised"
    supervised: MethodOptions | None = None
    dpo: MethodOptions | None = None
    reinforcement: Any = None


class FineTuningBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/fine_tuning/jobs. ``integrations`` must be empty: writers are set in the trainer's options."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Meta(max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Any = None
    guard: Guard | None = None
    """Not OpenAI's: ``extra_body`` of the SDK."""


class ExpiresAfter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When a file is removed: so many seconds after ``created_at``, one hour to thirty days."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)]


class UploadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/uploads."""

    bytes: Annotated[int, Meta(ge=1)]
    filename: Annotated[str, Meta(min_length=1, max_length=1024)]
    mime_type: Annotated[str, Meta(max_length=255)]
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/uploads/{upload_id}/complete."""

    part_ids: Annotated[list[str], Meta(min_length=1, max_length=10_000)]
    md5: str | None = None


def spec_of(body: FineTuningBody) -> JobSpec:
    """The job that a request describes, "auto" resolved. Raises RequestError for what would be ignored."""
    if body.integrations:
        raise refuse("integrations", "integrations of one job", "none, or an empty list; curves of all jobs are written by "
                     "the trainer's options service.writers.wandb_project and service.writers.tensorboard_dir")  # fmt: skip
    method = body.method.type if body.method else "supervised"
    if method not in METHODS or (body.method and body.method.reinforcement is not None):
        got = repr(method[:40]) if method not in METHODS else "options of 'reinforcement'"
        field = "method.type" if method not in METHODS else "method.reinforcement"
        raise refuse(field, got, "'supervised' or 'dpo': a grader's rewards are not trained on here")
    options = getattr(body.method, method) if body.method else None
    other = "dpo" if method == "supervised" else "supervised"
    if body.method and getattr(body.method, other) is not None:
        raise refuse(f"method.{other}", "options", f"only method.{method}, as method.type says")
    own, older = (options.hyperparameters if options else None) or Hyperparameters(), body.hyperparameters

    def resolve(name: str, automatic: float) -> Any:
        value, repeated = (_number(name, getattr(each, name)) for each in (own, older or Hyperparameters()))
        if value is not None and repeated is not None and value != repeated:
            got = f"{repeated:g} beside {value:g} in method.{method}.hyperparameters"
            raise refuse(f"hyperparameters.{name}", got, "one value, or the same one twice; leave hyperparameters out")
        chosen = repeated if value is None else value
        return automatic if chosen is None else chosen

    beta = resolve("beta", 0.0)
    if beta and method == "supervised":
        raise refuse("hyperparameters.beta", f"{beta:g} for method 'supervised'", "it only for method 'dpo'")

    return JobSpec(
        method=method,
        epochs=resolve("n_epochs", DEFAULT_EPOCHS),
        batch_size=resolve("batch_size", DEFAULT_BATCH_SIZE),
        learning_rate_scale=float(resolve("learning_rate_multiplier", 1.0)),
        beta=float(beta or DEFAULT_BETA),
        seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
        save_at_end=True,
        guard=body.guard,
        metadata=body.metadata or {},
        model=body.model,
        suffix=body.suffix or "",
        training_file=body.training_file,
        validation_file=body.validation_file or "",
    )


def _number(name: str, value: float | str | None) -> float | None:
    """The number, or None for "auto"."""
    if isinstance(value, str) and value != "auto":
        raise refuse(f"hyperparameters.{name}", repr(value[:40]), "a number or 'auto'")
    return None if isinstance(value, str) else value
