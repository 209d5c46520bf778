"""Messages between the coordinator and trainer rank 0: msgspec structs over one ZMQ DEALER/ROUTER pair.

The coordinator is the state machine. Ranks execute one command at a time and keep nothing of a job between commands, so
that cancelling, pausing and resuming after a crash are all "do not send the next step". Every command carries an ``id``
that its reply repeats. Commands travel from the coordinator to rank 0 and from there to all ranks; replies travel from
rank 0 to the coordinator. Both sides may send several messages ahead: rank 0 executes commands in order.
"""

from __future__ import annotations

import msgspec

from apollo_tp.wire.losses import Loss, LossConfig

PROTOCOL_VERSION = 3


class Sampled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a completion that a model sampled. The lists are empty, or have one value for each of the last tokens
    of the sequence: nats, under the model that sampled them, a reference and a teacher, all at ``temperature``.

    ``weight_version``: that of the weights that sampled it; None if the client did not say.
    """

    sampling_logprobs: list[float] = []
    advantages: list[float] = []
    reference_logprobs: list[float] = []
    teacher_logprobs: list[float] = []
    temperature: float = 1.0
    reward: float | None = None
    weight_version: int | None = None


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One training sequence. ``weights[i]`` scales the loss of predicting ``token_ids[i]``; 0 means "only context".

    ``weights[0]`` has no predictor and must be 0.
    """

    token_ids: list[int]
    weights: list[float]
    sampled: Sampled = Sampled()


class PreferencePair(msgspec.Struct, frozen=True):
    """A DPO pair and the reference log-probabilities (nats, summed over weighted tokens) of each side."""

    preferred: Sample
    rejected: Sample
    reference_preferred: float
    reference_rejected: float


# --- commands, coordinator -> rank 0 -------------------------------------------------------------------------------


class Command(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Base of all commands. ``id`` is unique within one run of the coordinator."""

    id: str


class Step(Command, frozen=True):
    """One optimizer step of ``loss`` on ``samples``, the global batch; the ranks cut micro-batches.

    ``job_step`` counts from 1 to ``num_job_steps`` within the job. ``learning_rate_scale`` multiplies the configured
    learning rate. Samples of weights that are more than ``max_staleness`` versions older than those that are trained are
    dropped.
    """

    job_id: str
    job_step: int
    samples: list[Sample]
    num_job_steps: int = 0
    learning_rate_scale: float = 1.0
    loss: Loss = Loss()
    max_staleness: int | None = None


class PreferenceStep(Command, frozen=True):
    """One optimizer step of DPO on ``pairs``; ``beta`` is the inverse temperature of the loss."""

    job_id: str
    job_step: int
    pairs: list[PreferencePair]
    num_job_steps: int = 0
    beta: float = 0.1
    learning_rate_scale: float = 1.0


SUMMED = Loss("cross_entropy", LossConfig(normalisation="constant", divisor=1.0))
"""The weighted sum of negative log-likelihoods; weights may be negative."""


class ForwardBackward(Command, frozen=True):
    """Add the gradients of ``loss`` on ``samples`` to those that the ranks keep until the next OptimizerStep. They are gone
    after a command that failed, and after a Step or PreferenceStep."""

    samples: list[Sample]
    loss: Loss = SUMMED


class OptimizerStep(Command, frozen=True):
    """One optimizer step on the sum of the gradients of the last ``num_passes`` ForwardBackward commands, which had
    ``num_samples`` samples. Options that are None are the configured ones; ``max_grad_norm`` 0 switches clipping off."""

    job_id: str
    job_step: int
    num_passes: int
    num_samples: int
    num_job_steps: int = 0
    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None


AnyStep = Step | PreferenceStep | OptimizerStep


class Score(Command, frozen=True):
    """Forward only: the summed, weighted log-probability of each sample under the current weights, at its temperature; with
    ``per_token`` also that of each token."""

    samples: list[Sample]
    per_token: bool = False


class SaveCheckpoint(Command, frozen=True):
    """Write the live weights and the optimizer state to ``name`` below the configured checkpoint folder. Those that are
    ``kept`` are not removed for it, however old. A ``snapshot`` may be kept in host memory in place of that."""

    name: str
    kept: list[str] = []
    snapshot: bool = False


class CheckpointWritten(Command, frozen=True):
    """From rank 0 to all ranks: what became of the checkpoint that the command of this ``id`` asked for, and that was
    written while training went on. ``error`` says why there is none."""

    path: str
    num_bytes: int
    seconds: float
    stopped_seconds: float
    weight_version: int
    error: str = ""


class RestoreCheckpoint(Command, frozen=True):
    """Put the weights and the optimizer state of checkpoint ``name`` into the served memory and the optimizer, all or
    nothing. ``restore_id`` names the request, and comes back in ``Hello.last_restore_id``. With ``fallback`` the former is a
    snapshot in host memory; if that was lost, the checkpoint ``fallback`` is restored, and LOST is behind the id."""

    name: str
    restore_id: str
    fallback: str = ""


LOST = "/lost"


class Shutdown(Command, frozen=True):
    """Leave the rank loop on all ranks after the commands before this one."""

    reason: str


class Identify(Command, frozen=True):
    """Answer with ``Hello`` (repeating ``id``), in order with the other commands.

    A restarted coordinator sends it first. It is answered in order, so all commands that the coordinator sent before its
    restart are finished by then, and ``Hello.last_job_step`` is the last step of the interrupted job that was completed.
    """


AnyCommand = (
    AnyStep | ForwardBackward | Score | SaveCheckpoint | CheckpointWritten | RestoreCheckpoint | Shutdown | Identify
)

# --- replies and notices, rank 0 -> coordinator --------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Base of all that rank 0 sends. ``id`` repeats the command's; it is empty for notices."""

    id: str = ""


class Replica(msgspec.Struct, frozen=True):
    """A served copy of the model that is trained: its server's instance id, and its host."""

    instance_id: str
    host: str


class Hello(Reply, frozen=True):
    """First message of rank 0 and reply to ``Identify``: what is being trained, and the limits of requests.

    ``last_job_id`` and ``last_job_step`` name the last Step or PreferenceStep that these ranks completed ("" and 0 when
    none): after a crash of the coordinator they prevent that a step whose reply was lost is run twice.
    """

    protocol_version: int
    instance_id: str
    server_life: str
    """Identifies one run of the server process: a later one may have the same ``instance_id``, but other weights."""
    model_path: str
    served_model_names: list[str]
    num_ranks: int
    vocab_size: int
    max_sequence_tokens: int
    weight_version: int
    num_parameters: int
    optimizer: str
    gradients: str
    sync: str = "hogwild"
    cache: str = "none"
    memory: str = ""
    """The memory planned for the longest micro-batch, in one line."""
    qos: str = "sm_percent=null low_priority=false pace=1"
    attention_window: int = 0
    """Tokens of the widest window that a layer's attention has; 0 if none has one."""
    layout: list[dict[str, str | int | list[int]]] = []
    """Rows for the layout view: checkpoint tensor, rank, served tensor, part; may be empty."""
    last_job_id: str = ""
    last_job_step: int = 0
    last_restore_id: str = ""
    """Of the last restore that these ranks began and completed, or that they completed for their predecessors."""
    replicas: list[Replica] = []
    """All servers that are trained; ``instance_id`` and what else is said of one server are those of the first."""
    num_replicas: int = 1
    """How many there should be: others are away."""


class StepFigures(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename={"loss": "train_loss", "token_accuracy": "train_mean_token_accuracy"},  # as clients see them, OpenAI's names
):
    """What one optimizer step did. The trainer fills it, and everything else reads this record: it travels in
    ``StepDone``, and its encoded form is the data of a job's event. No field has a default: none can be forgotten.

    All fields are the same on every rank but for the times: those are measured on rank 0, by its host for the full step
    and by its device (on CUDA) for the parts.
    """

    loss: float
    """Before the update: weighted mean negative log-likelihood in nats, or the mean DPO loss."""
    token_accuracy: float
    """Share of the tokens with a loss weight that are the arg max of the model's prediction."""
    num_tokens: int
    num_loss_tokens: int
    padding_share: float
    """Share of the micro-batches' token budget that no sample filled."""
    num_micro_batches: int
    gradients: str
    """How gradients were kept: "in_backward" (each matrix was updated in the backward pass) or "stored"."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    largest_update: float
    """Largest norm of an update relative to its matrix."""
    num_updated: int
    """Parameters that were written."""
    skipped: str
    """Why the step was stopped, or "". Only an update in the backward pass may have written tensors by then."""
    weight_version: int
    """The weight version after the step."""
    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    paused_seconds: float
    """For how long the server was paused for the update."""
    peak_memory_bytes: list[int]
    """Peak memory of each rank beyond the served weights."""
    metrics: dict[str, float]
    """Further figures by name, for example DPO's reward margin."""


class StepDone(Reply, frozen=True):
    """An optimizer step ended on all ranks. ``replica_lag_seconds``: of each replica, by the clocks of their hosts, how much
    later than the first one it had all new weights; empty for one replica."""

    figures: StepFigures
    replica_lag_seconds: list[float] = []


class ForwardBackwardDone(Reply, frozen=True):
    """Gradients were added on all ranks. ``loss`` in nats, of this command alone; ``num_passes`` counts the commands since
    the last step; ``metrics`` are further figures by name."""

    loss: float
    num_tokens: int
    num_loss_tokens: int
    num_passes: int
    seconds: float
    metrics: dict[str, float] = {}


class ScoreDone(Reply, frozen=True):
    """Per sample: summed weighted log-probability in nats, sum of weights, and weighted tokens predicted by arg max; if
    asked for, the log-probability of each token, 0 where its weight is 0."""

    logprobs: list[float]
    weights: list[float]
    num_correct: list[float]
    token_logprobs: list[list[float]] = []


class CheckpointDone(Reply, frozen=True):
    """The checkpoint folder is complete at ``path``, ``seconds`` after the ranks began; for ``stopped_seconds`` of these no
    step could be made. ``weight_version`` is that of the weights in it. With ``fallback`` it is a snapshot in host memory
    alone, in whose place that checkpoint is restored if the memory is lost; ``path`` is "" then."""

    path: str
    num_bytes: int
    seconds: float
    weight_version: int
    stopped_seconds: float = 0.0
    fallback: str = ""


class RestoreDone(Reply, frozen=True):
    """All weights and the optimizer state are those of the checkpoint at ``path`` ("": of the snapshot in memory). The
    server was paused for ``paused_seconds`` of the ``seconds``, if its mode says so."""

    path: str
    seconds: float
    weight_version: int
    paused_seconds: float = 0.0


class CommandFailed(Reply, frozen=True):
    """A rank raised while executing the command; the ranks do not retry it."""

    rank: int
    error: str
    message: str
    traceback: str


class Heartbeat(Reply, frozen=True):
    """Sent about once a second, also while the ranks are busy. ``busy_with`` is the id of the command being executed."""

    weight_version: int
    busy_with: str = ""


class Goodbye(Reply, frozen=True):
    """The ranks are leaving, with the reason; no further reply comes."""

    reason: str
    failed: bool = False


AnyReply = (
    Hello
    | StepDone
    | ForwardBackwardDone
    | ScoreDone
    | CheckpointDone
    | RestoreDone
    | CommandFailed
    | Heartbeat
    | Goodbye
)
