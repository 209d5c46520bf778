"""Bodies of the OpenAI routes as msgspec structs, and the job that a fine-tuning body describes."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_tp.coordinator.graders.grading import offered
from apollo_tp.coordinator.graders.schema import read_grader
from apollo_tp.coordinator.jobs.job import JobSpec
from apollo_tp.coordinator.samples.schema import Guard, Metadata
from apollo_tp.coordinator.settings import Settings
from apollo_tp.errors import refuse
from apollo_tp.wire.losses import LossConfig, complete

DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
DEFAULT_BETA = 0.1
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 24 * 3600
METHODS = ("supervised", "dpo", "reinforcement")


class Hyperparameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Numbers, or "auto": 3 epochs, batches of 8, the configured learning rate, beta 0.1. Null is "auto"."""

    n_epochs: Annotated[int, Meta(ge=1, le=10_000)] | str | None = "auto"
    batch_size: Annotated[int, Meta(ge=1, le=4096)] | str | None = "auto"
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=1000)] | str | None = "auto"
    beta: Annotated[float, Meta(gt=0, le=100)] | str | None = "auto"


class MethodOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of one method."""

    hyperparameters: Hyperparameters | None = None


class ReinforcementHyperparameters(Hyperparameters, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Numbers, or "auto". ``compute_multiplier`` times rl.completions is how many completions each prompt has in a step;
    every ``eval_interval`` steps, ``eval_samples`` of each prompt of the validation file are sampled."""

    compute_multiplier: Annotated[float, Meta(gt=0, le=1000)] | str | None = "auto"
    eval_interval: Annotated[int, Meta(ge=1, le=2**31)] | str | None = "auto"
    eval_samples: Annotated[int, Meta(ge=1, le=1024)] | str | None = "auto"
    reasoning_effort: str | None = None


class ReinforcementOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``grader``: one of OpenAI's graders (see graders/schema.py)."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters | None = None
    response_format: Any = None


class Method(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to train: ``type``, and the options of that method alone."""

    type: str = "supervised"
    supervised: MethodOptions | None = None
    dpo: MethodOptions | None = None
    reinforcement: ReinforcementOptions | None = None


class GraderBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/fine_tuning/alpha/graders/validate."""

    grader: dict[str, Any]


class GraderRunBody(GraderBody, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/fine_tuning/alpha/graders/run: a grader, a completion, and the line of a file that it belongs to."""

    model_sample: Annotated[str, Meta(max_length=1_000_000)]
    item: dict[str, Any] | None = None


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


def spec_of(body: FineTuningBody, settings: Settings) -> JobSpec:
    """The job that a request describes, "auto" resolved. Raises RequestError for what would be ignored."""
    if body.integrations:
        raise refuse("integrations", "integrations of one job", "none, or an empty list; curves of all jobs are written by "
                     "the trainer's options service.writers")  # fmt: skip
    method = body.method.type if body.method else "supervised"
    if method not in METHODS:
        raise refuse("method.type", repr(method[:40]), f"one of {', '.join(METHODS)}")
    options = getattr(body.method, method) if body.method else None
    for other in METHODS:
        if body.method and other != method and getattr(body.method, other) is not None:
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
    if beta and method != "dpo":
        raise refuse("hyperparameters.beta", f"{beta:g} for method {method!r}", "it only for method 'dpo'")

    spec = JobSpec(
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
    return spec if method != "reinforcement" else _reinforced(spec, options, settings)


def _reinforced(spec: JobSpec, options: ReinforcementOptions | None, settings: Settings) -> JobSpec:
    field = "method.reinforcement"
    if options is None:
        raise refuse(field, "nothing", "it with a grader, as method.type says")
    if settings.service.server_url is None:
        raise refuse("method.type", "'reinforcement'", "service.server_url to be set: the address of the server, which the "
                     "completions are sampled from")  # fmt: skip
    if options.response_format is not None:
        expected = (
            "none: constrained sampling has other log-probabilities than the trainer; let the grader reward the format"
        )
        raise refuse(f"{field}.response_format", "one", expected)
    own = options.hyperparameters or ReinforcementHyperparameters()
    if own.reasoning_effort not in (None, "default"):
        raise refuse(f"{field}.hyperparameters.reasoning_effort", repr(own.reasoning_effort[:40]), "'default'")
    grader = read_grader(options.grader, offered(settings.rl), f"{field}.grader")
    multiplier = _number("compute_multiplier", own.compute_multiplier)
    interval, samples = (_number(name, getattr(own, name)) for name in ("eval_interval", "eval_samples"))
    return msgspec.structs.replace(
        spec,
        loss=complete("ppo", LossConfig()),
        grader=grader,
        completions=max(2, round(settings.rl.completions * (multiplier or 1.0))),
        eval_interval=None if interval is None else int(interval),
        eval_samples=int(samples or 1),
    )


def _number(name: str, value: float | str | None) -> float | None:
    """The number, or None for "auto"."""
    if isinstance(value, str) and value != "auto":
        raise refuse(f"hyperparameters.{name}", repr(value[:40]), "a number or 'auto'")
    return None if isinstance(value, str) else value
