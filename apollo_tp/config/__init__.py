"""The options, as Hydra structured configs: one dataclass per owner, a help line per field, checks in __post_init__.

No torch here: the launcher reads its options before anything heavy is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from apollo_tp.config.options import check, option
from apollo_tp.config.service import CaptureConfig as CaptureConfig
from apollo_tp.config.service import HttpConfig as HttpConfig
from apollo_tp.config.service import LearnConfig as LearnConfig
from apollo_tp.config.service import OnCrash as OnCrash
from apollo_tp.config.service import ServiceConfig as ServiceConfig
from apollo_tp.config.service import WriterConfig as WriterConfig
from apollo_tp.config.service import ZmqConfig as ZmqConfig


class OptimizerKind(Enum):
    apollo = "apollo"
    apollo_mini = "apollo_mini"
    adamw = "adamw"


class EmbeddingMode(Enum):
    adamw = "adamw"
    project = "project"
    frozen = "frozen"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Precision(Enum):
    remainder = "remainder"
    remainder16 = "remainder16"
    stochastic = "stochastic"
    nearest = "nearest"


class PrecisionChoice(Enum):
    """``Precision``, or ``auto``: a remainder by the learning rate; see ``optim.rounding.choose``."""

    auto = "auto"
    remainder = "remainder"
    remainder16 = "remainder16"
    stochastic = "stochastic"
    nearest = "nearest"


class GradientMode(Enum):
    auto = "auto"
    stored = "stored"
    in_backward = "in_backward"
    fused = "in_backward"  # noqa: PIE796 - an alias: the name of earlier releases


class Matmul(Enum):
    served = "served"
    fp8 = "fp8"


class Projection(Enum):
    rademacher = "rademacher"
    gaussian = "gaussian"


@dataclass(kw_only=True)
class OptimConfig:
    kind: OptimizerKind = option(OptimizerKind.apollo, "apollo | apollo_mini | adamw")
    rank: int = option(64, "rank of the projected moments, one constant for all matrices")
    lr: float = option(1e-5, "learning rate (AdamW's scale when scale=auto)")
    scale: str = option("auto", "'auto' (small side / rank: the AdamW-equivalent step) or a number")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the first and second moments")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.0, "decoupled weight decay, applied before the update")
    max_grad_norm: float | None = option(1.0, "clip the global gradient norm to this; null switches clipping off")
    refresh_every: int = option(200, "steps between two projections of a matrix")
    projection: Projection = option(Projection.rademacher, "rademacher | gaussian")
    norm_growth_limit: float | None = option(1.01, "norm-growth limiter's gamma; null switches it off")
    embeddings: EmbeddingMode = option(EmbeddingMode.project, "embedding and head: project | adamw | frozen")
    schedule: Schedule = option(Schedule.constant, "constant | linear (to 0) | cosine (to 10 %), over all jobs")
    warmup_steps: int = option(0, "steps of linear warm-up, counted over all jobs")
    total_steps: int | None = option(None, "where linear and cosine schedules end")
    max_relative_update: float = option(
        0.1, "refuse a step that would move a matrix by more than this share of its norm"
    )
    max_skipped_steps: int = option(5, "a job fails after this many skipped (non-finite) steps in a row")
    check_replicas_every: int = option(50, "steps between two checks that replicas are bit-identical; 0 is never")
    seed: int = option(0, "seed of projections and stochastic rounding")
    reset_state: bool = option(False, "start with fresh optimizer state, at every start while it is set")

    def __post_init__(self) -> None:
        check(self.rank >= 1, "optim.rank", self.rank, "an integer >= 1")
        check(0 < self.lr < math.inf, "optim.lr", self.lr, "a number > 0 and finite")
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        check(two, "optim.betas", self.betas, "two numbers in [0, 1)")
        check(self.refresh_every >= 1, "optim.refresh_every", self.refresh_every, "an integer >= 1")
        check(self.scale == "auto" or _is_positive(self.scale), "optim.scale", self.scale, "'auto' or a number > 0")
        check(self.eps > 0, "optim.eps", self.eps, "a number > 0")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number >= 0")
        check(self.max_relative_update > 0, "optim.max_relative_update", self.max_relative_update, "a number > 0")
        check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "an integer >= 0")
        check(self.max_skipped_steps >= 1, "optim.max_skipped_steps", self.max_skipped_steps, "an integer >= 1")
        limit, clip = self.norm_growth_limit, self.max_grad_norm
        check(limit is None or limit > 1, "optim.norm_growth_limit", limit, "a number > 1, or null")
        check(clip is None or clip > 0, "optim.max_grad_norm", clip, "a number > 0, or null")
        self._check_schedule()

    def _check_schedule(self) -> None:
        total = self.total_steps
        check(total is None or total >= 1, "optim.total_steps", total, "an integer >= 1, or null")
        check(
            self.schedule is Schedule.constant or (total is not None and total > self.warmup_steps),
            "optim.total_steps",
            total,
            f"the number of steps, which schedule={self.schedule.value} needs: more than optim.warmup_steps "
            f"({self.warmup_steps})",
        )


@dataclass(kw_only=True)
class RlConfig:
    max_staleness: int | None = option(
        None, "drop samples of weights that are more updates than this behind the current ones; null keeps all"
    )
    completions: int = option(8, "completions of a prompt in a reinforcement job whose compute_multiplier is 1")
    max_completion_tokens: int = option(256, "longest completion in a reinforcement job")
    sampling_seconds: float = option(600.0, "deadline of the completions of one step, and of their grades")
    server_key_file: str | None = option(None, "file with the API key of service.server_url; null: it needs none")
    score_model_url: str | None = option(
        None, "OpenAI-compatible API for graders of type score_model, with its /v1; null refuses them"
    )
    score_model_key_file: str | None = option(None, "file with that API's key; null: it needs none")
    python_graders: bool = option(False, "run graders of type python, code of clients, in isolated processes")
    python_grader_seconds: float = option(10.0, "deadline of such a grader for one completion")

    def __post_init__(self) -> None:
        limit = self.max_staleness
        check(limit is None or limit >= 0, "rl.max_staleness", limit, "an integer >= 0, or null")
        check(2 <= self.completions <= 1024, "rl.completions", self.completions, "an integer from 2 to 1024")
        for name in ("max_completion_tokens", "sampling_seconds", "python_grader_seconds"):
            check(getattr(self, name) > 0, f"rl.{name}", getattr(self, name), "a number > 0")
        for name, url in (("rl.score_model_url", self.score_model_url),):
            check(
                url is None or url.startswith(("http://", "https://")), name, url, "an address with http:// or https://"
            )


@dataclass(kw_only=True)
class ServerConfig:
    instance: str | None = option(None, "instance id of the vLLM server; null takes the only live one")
    replicas: int = option(1, "servers of one model that are trained together and stay bit-identical")
    instances: list[str] = option(list, "instance ids of the replicas; [] takes all live servers")
    min_replicas: int | None = option(None, "train on with as few of them while others are away; null: only with all")
    replica_wait_seconds: float = option(30.0, "how long to wait for more than server.min_replicas of them")
    runtime_dir: str | None = option(
        None, "folder of manifests and sockets; null: $APOLLO_TP_RUNTIME_DIR or the default"
    )
    wait_seconds: float = option(600.0, "how long to wait for the server at start-up, until its engine is up")
    verify_tensors: int = option(8, "checkpoint tensors compared bit for bit with the mapped memory; -1 is all")

    def __post_init__(self) -> None:
        names, count = self.instances, self.replicas
        check(count >= 1, "server.replicas", count, "an integer >= 1")
        check(
            not names or len(set(names)) == len(names) == count,
            "server.instances",
            names,
            f"{count} ids, as many as server.replicas, all different",
        )
        check(
            self.min_replicas is None or 1 <= self.min_replicas <= count,
            "server.min_replicas",
            self.min_replicas,
            f"null or 1 to {count}, which is server.replicas",
        )
        both = self.instance is not None and (count > 1 or bool(names))
        check(not both, "server.instance", self.instance, "null where server.replicas or server.instances is set")


@dataclass(kw_only=True)
class ModelConfig:
    trust_remote_code: bool = option(False, "run Python code that is in the model's folder (auto_map in config.json)")


@dataclass(kw_only=True)
class TrainConfig:
    max_micro_batch_tokens: int = option(2048, "tokens packed into one micro-batch")
    max_sequence_tokens: int = option(2048, "longest accepted sequence")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    gradients: GradientMode = option(
        GradientMode.auto, "in_backward (update in the backward pass) | stored | auto (by step)"
    )
    compile: bool | None = option(None, "compile decoder layers with torch.compile; null: on GPUs only")
    matmul: Matmul = option(
        Matmul.served,
        "products of linear layers: served (in the weights' dtype) | fp8 (of bf16 weights; faster, rougher)",
    )
    peer_memory: bool = option(True, "two GPUs with access to each other sum through their memory; false: NCCL")
    cuda_graphs: bool = option(True, "record steps of one batch structure and replay them, where GPU memory allows")
    precision: PrecisionChoice = option(
        PrecisionChoice.auto,
        "bf16 writes: remainder | remainder16 | stochastic | nearest | auto (a remainder by optim.lr)",
    )
    threads: int | None = option(None, "CPU threads per rank; null leaves torch's default")

    def __post_init__(self) -> None:
        check(
            2 <= self.max_sequence_tokens <= self.max_micro_batch_tokens,
            "train.max_sequence_tokens",
            self.max_sequence_tokens,
            f"2 to train.max_micro_batch_tokens ({self.max_micro_batch_tokens})",
        )


class SyncMode(Enum):
    hogwild = "hogwild"
    step_lock = "step_lock"
    drain = "drain"


class CacheMode(Enum):
    none = "none"
    reset = "reset"
    salt = "salt"


@dataclass(kw_only=True)
class SyncConfig:
    mode: SyncMode = option(SyncMode.hogwild, "running requests at an update: hogwild | step_lock | drain")
    cache: CacheMode = option(CacheMode.none, "the prefix cache after an update: none | reset | salt")
    timeout_seconds: float = option(60.0, "a step fails when the server has not paused (or drained) after this long")
    max_pause_seconds: float = option(120.0, "a step that keeps the server paused for longer is given up")

    def __post_init__(self) -> None:
        check(self.timeout_seconds > 0, "sync.timeout_seconds", self.timeout_seconds, "a number > 0")
        check(self.max_pause_seconds > 0, "sync.max_pause_seconds", self.max_pause_seconds, "a number > 0")


@dataclass(kw_only=True)
class QosConfig:
    sm_percent: int | None = option(None, "share of each GPU's SMs for the trainer, under CUDA MPS; null: all of them")
    low_priority: bool = option(False, "whether inference's kernels go before the trainer's, under CUDA MPS")
    pace: float = option(1.0, "share of the time that the trainer keeps the GPU busy; it sleeps after each layer")

    def __post_init__(self) -> None:
        percent = self.sm_percent
        check(percent is None or 1 <= percent <= 100, "qos.sm_percent", percent, "an integer from 1 to 100, or null")
        check(0 < self.pace <= 1, "qos.pace", self.pace, "a number > 0 and <= 1")


@dataclass(kw_only=True)
class CheckpointConfig:
    dir: str = option("apollo_tp_checkpoints", "folder that checkpoints are written below")
    after_idle_seconds: float | None = option(300.0, "write one this long after the last job; null is never")
    behind: bool = option(True, "stop for a copy to host memory alone, where it fits, and write while training goes on")
    keep_memory: bool = option(True, "keep the host memory of such a copy for the next one, which then stops for less")
    guard_in_memory: bool = option(
        False, "snapshots of guards stay in host memory, if that has room and there is an older checkpoint on disk"
    )
    keep: int = option(3, "complete checkpoints of one model kept; older ones are removed")
    resume: bool = option(True, "load the optimizer state of the latest checkpoint of this model at start-up")

    def __post_init__(self) -> None:
        check(bool(self.dir), "checkpoint.dir", self.dir, "the path of a folder")


@dataclass(kw_only=True)
class Config:
    server: ServerConfig = option(ServerConfig, "which vLLM server to train")
    model: ModelConfig = option(ModelConfig, "how the served model's folder is read")
    optim: OptimConfig = option(OptimConfig, "APOLLO and its relatives")
    train: TrainConfig = option(TrainConfig, "batches, memory, precision")
    rl: RlConfig = option(RlConfig, "learning from sampled completions")
    sync: SyncConfig = option(SyncConfig, "consistency with running inference")
    qos: QosConfig = option(QosConfig, "how much of the GPUs is left to inference")
    service: ServiceConfig = option(ServiceConfig, "the coordinator")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "when and where checkpoints are written")
    capture: CaptureConfig = option(CaptureConfig, "storing completions of the server")
    learn: LearnConfig = option(LearnConfig, "learning from feedback on stored completions")
    command_timeout_seconds: float = option(600.0, "deadline of one collective between trainer ranks")

    def __post_init__(self) -> None:
        in_backward, clip = self.train.gradients is GradientMode.in_backward, self.optim.max_grad_norm
        # clipping needs the norm of the whole gradient before the first matrix is written
        check(not in_backward or clip is None, "optim.max_grad_norm", clip, "null with train.gradients=in_backward")
        check(
            not in_backward or self.server.replicas == 1,
            "train.gradients",
            self.train.gradients.value,
            "stored or auto with server.replicas > 1, since gradients are summed over replicas before any is used",
        )
        commanded = self.learn.guard is None or bool(self.service.guard_command)
        check(commanded, "service.guard_command", [], "a program, which learn.guard needs")
        seconds, limit = self.sync.timeout_seconds, self.command_timeout_seconds
        check(0 < limit < math.inf, "command_timeout_seconds", limit, "a number > 0 and finite")
        # the other ranks wait in a collective while rank 0 waits for the server
        check(
            self.sync.mode is SyncMode.hogwild or seconds < limit,
            "sync.timeout_seconds",
            seconds,
            f"less than command_timeout_seconds ({limit:g})",
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
