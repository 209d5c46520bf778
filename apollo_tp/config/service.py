"""Options of the coordinator: its endpoints, its state, what it stores and what it learns by itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from apollo_tp.config.options import check, option

MAX_PORT = 65535


@dataclass(kw_only=True)
class HttpConfig:
    host: str = option("127.0.0.1", "address of the coordinator's HTTP endpoint")
    port: int = option(8300, "port of the coordinator's HTTP endpoint; 0 takes a free one")

    def __post_init__(self) -> None:
        check(0 <= self.port <= MAX_PORT, "service.http.port", self.port, f"an integer from 0 to {MAX_PORT}")


@dataclass(kw_only=True)
class ZmqConfig:
    host: str = option("127.0.0.1", "address of the coordinator's ZMQ endpoint over TCP")
    port: int | None = option(None, "its port; null: no ZMQ over TCP, only the private unix sockets")
    keys_dir: str | None = option(None, "folder of CURVE keys, which TCP needs; `apollo-tp keys DIR` makes them")

    def __post_init__(self) -> None:
        valid = self.port is None or 0 <= self.port <= MAX_PORT
        check(valid, "service.zmq.port", self.port, f"an integer from 0 to {MAX_PORT}, or null")


class OnCrash(Enum):
    resume = "resume"
    fail = "fail"


@dataclass(kw_only=True)
class WriterConfig:
    tensorboard_dir: str | None = option(None, "folder for TensorBoard event files; null writes none")
    wandb_project: str | None = option(None, "Weights & Biases project; null writes none")
    wandb_mode: str = option("offline", "offline | online")
    mlflow_uri: str | None = option(None, "MLflow tracking server (http://HOST:PORT) or store; null writes none")
    mlflow_experiment: str = option("apollo_tp", "its experiment")
    otlp_endpoint: str | None = option(None, "OpenTelemetry collector (http://HOST:4318, OTLP over HTTP); null: none")

    def __post_init__(self) -> None:
        mode = self.wandb_mode
        check(mode in ("offline", "online"), "service.writers.wandb_mode", mode, "offline or online")
        endpoint = self.otlp_endpoint
        is_http = endpoint is None or endpoint.startswith(("http://", "https://"))
        check(is_http, "service.writers.otlp_endpoint", endpoint, "an address that begins with http:// or https://")


@dataclass(kw_only=True)
class ServiceConfig:
    http: HttpConfig = option(HttpConfig, "the coordinator's HTTP endpoint")
    zmq: ZmqConfig = option(ZmqConfig, "the coordinator's ZMQ endpoint for other hosts")
    state_dir: str = option("apollo_tp_state", "folder of jobs, their samples and uploaded files")
    max_queued_jobs: int = option(64, "further jobs are answered 429")
    max_body_bytes: int = option(64 * 2**20, "larger request bodies are answered 413")
    max_file_bytes: int = option(512 * 2**20, "larger uploaded files are answered 413")
    max_files: int = option(1000, "further uploads are answered 400 until some are deleted")
    max_state_bytes: int = option(16 * 2**30, "disk use of uploaded files and of jobs' samples, together")
    token_file: str | None = option(None, "file with the bearer token(s); null: $APOLLO_TP_TOKEN, else none")
    rank_timeout_seconds: float = option(30.0, "without a heartbeat of rank 0 for this long, the ranks count as gone")
    on_crash: OnCrash = option(OnCrash.resume, "an interrupted job: resume (from its last completed step) | fail")
    guard_command: list[str] = option(
        list, "program and arguments that judge the served weights for a job's guard; [] is none"
    )
    guard_seconds: float = option(600.0, "a job whose guard command runs for longer fails")
    server_url: str | None = option(None, "the model server's address, for the page's latency figures")
    writers: WriterConfig = option(WriterConfig, "curves for other tools")

    def __post_init__(self) -> None:
        check(self.max_queued_jobs >= 1, "service.max_queued_jobs", self.max_queued_jobs, "an integer >= 1")
        check(self.max_body_bytes >= 1024, "service.max_body_bytes", self.max_body_bytes, "an integer >= 1024")
        check(self.rank_timeout_seconds > 0, "service.rank_timeout_seconds", self.rank_timeout_seconds, "a number > 0")
        check(self.guard_seconds > 0, "service.guard_seconds", self.guard_seconds, "a number > 0")


@dataclass(kw_only=True)
class CaptureConfig:
    enabled: bool = option(False, "store completions whose clients ask for it: store=true, or a header with a session")
    max_age_days: float = option(30.0, "older completions are removed")
    max_count: int = option(100_000, "the oldest beyond so many are removed")
    max_bytes: int = option(2 * 2**30, "the oldest beyond so many bytes are removed")

    def __post_init__(self) -> None:
        for name in ("max_age_days", "max_count", "max_bytes"):
            check(getattr(self, name) > 0, f"capture.{name}", getattr(self, name), "a number > 0")


@dataclass(kw_only=True)
class LearnConfig:
    every_samples: int | None = option(None, "train once so many completions have new feedback; null: never by number")
    every_seconds: float | None = option(None, "train once feedback has waited for so long; null: never by time")
    loss: str = option("ppo", "the loss for rewards: importance_sampling | ppo | cispo | gspo")
    corrections: str = option(
        "supervised", "corrected answers: imitated, preferred to the served ones: supervised | dpo | both"
    )
    dpo_beta: float = option(0.1, "the inverse temperature of DPO's loss, for corrected answers")
    learning_rate_scale: float = option(1.0, "times optim.lr, for what is learned from feedback")
    replay_share: float = option(
        0.5, "earlier corrected answers, as a share of the new ones, that are trained on again"
    )
    guard: str | None = option(None, "service.guard_command judges each batch: report | rollback; null: nothing does")
    max_worse: float = option(0.0, "by how much its number may be worse than before the batch")
    higher_is_better: bool = option(False, "of that number")
    votes_per_minute: int = option(60, "of one client; further feedback is answered 429")

    def __post_init__(self) -> None:
        losses = ("importance_sampling", "ppo", "cispo", "gspo")
        check(
            self.every_samples is None or self.every_samples >= 1,
            "learn.every_samples",
            self.every_samples,
            "null or >= 1",
        )
        check(
            self.every_seconds is None or self.every_seconds > 0,
            "learn.every_seconds",
            self.every_seconds,
            "null or > 0",
        )
        check(self.loss in losses, "learn.loss", self.loss, " | ".join(losses))
        ways = ("supervised", "dpo", "both")
        check(self.corrections in ways, "learn.corrections", self.corrections, " | ".join(ways))
        check(0 < self.dpo_beta <= 100, "learn.dpo_beta", self.dpo_beta, "a number > 0 and <= 100")
        check(
            0 < self.learning_rate_scale <= 1000, "learn.learning_rate_scale", self.learning_rate_scale, "> 0, <= 1000"
        )
        check(0 <= self.replay_share <= 10, "learn.replay_share", self.replay_share, "a number from 0 to 10")
        check(self.guard in (None, "report", "rollback"), "learn.guard", self.guard, "report | rollback, or null")
        check(self.max_worse >= 0, "learn.max_worse", self.max_worse, "a number >= 0")
        check(self.votes_per_minute >= 1, "learn.votes_per_minute", self.votes_per_minute, "an integer >= 1")
