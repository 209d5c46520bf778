"""/metrics in Prometheus format, fed by the scheduler's completed steps and read from the store at scrape time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, SummaryMetricFamily
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from apollo_tp.coordinator.http.parameters import StrictRoute
from apollo_tp.coordinator.http.server_metrics import Figures, LatencyHistory
from apollo_tp.coordinator.http.views import replicas_view
from apollo_tp.coordinator.jobs.job import Checkpoint, Job
from apollo_tp.coordinator.jobs.rank_link import RankLink
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.wire.commands import StepFigures

STEP_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """All metric names begin with ``apollo_``. Times are seconds, sizes bytes. Counters begin with this process."""

    def __init__(self, scheduler: Scheduler, store: Store, latency: LatencyHistory) -> None:
        self._scheduler, self._store, self._latency = scheduler, store, latency
        self.registry = registry = CollectorRegistry()
        self._loss = Gauge("apollo_loss_nats", "Training loss of the last step", registry=registry)
        self._valid = Gauge("apollo_validation_loss_nats", "Validation loss of the last evaluation", registry=registry)
        self._accuracy = Gauge(
            "apollo_token_accuracy", "Share of tokens predicted by arg max, last step", registry=registry
        )
        self._norm = Gauge("apollo_grad_norm", "Global gradient norm of the last step", registry=registry)
        self._rate = Gauge("apollo_learning_rate", "Learning rate of the last step", registry=registry)
        self._padding = Gauge("apollo_padding_share", "Share of padding in the last step's batches", registry=registry)
        self._further = Gauge(
            "apollo_step_figure", "Further figures of the last step, such as mismatch_kl", ["name"], registry=registry
        )
        self._tokens = Counter("apollo_tokens", "Tokens trained on", registry=registry)
        self._loss_tokens = Counter("apollo_loss_tokens", "Tokens with a loss weight", registry=registry)
        self._steps = Counter("apollo_steps", "Optimizer steps by outcome", ["outcome"], registry=registry)
        self._seconds = Histogram("apollo_step_seconds", "Whole step", buckets=STEP_BUCKETS, registry=registry)
        self._parts = Counter("apollo_step_part_seconds", "Time of steps by part", ["part"], registry=registry)
        self._memory = Gauge(
            "apollo_peak_memory_bytes", "Peak memory of the last step, by rank", ["rank"], registry=registry
        )
        self._checkpoints = Counter("apollo_checkpoints", "Checkpoints by outcome", ["outcome"], registry=registry)
        self._checkpoint_seconds = Gauge(
            "apollo_checkpoint_seconds", "How long the last checkpoint took to write", registry=registry
        )
        for outcome in ("completed", "skipped"):  # from zero: a rate would miss the first one otherwise
            self._steps.labels(outcome)
        for outcome in ("succeeded", "failed"):
            self._checkpoints.labels(outcome)
        registry.register(self)
        scheduler.saver.on_finished.append(self.on_checkpoint)
        scheduler.on_step.append(self.on_step)
        scheduler.on_evaluation.append(
            lambda job: self._valid.set(math.nan if job.valid_loss is None else job.valid_loss)
        )

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._checkpoints.labels(checkpoint.state).inc()
        if checkpoint.state == "succeeded":
            self._checkpoint_seconds.set(checkpoint.seconds)

    def on_step(self, job: Job, figures: StepFigures) -> None:
        self._steps.labels("skipped" if figures.skipped else "completed").inc()
        self._tokens.inc(figures.num_tokens)
        self._loss_tokens.inc(figures.num_loss_tokens)
        self._padding.set(figures.padding_share)
        self._rate.set(figures.learning_rate)
        if not figures.skipped:
            self._loss.set(figures.loss)
            self._accuracy.set(figures.token_accuracy)
            self._norm.set(figures.grad_norm)
            self._further.clear()
        for name, value in figures.metrics.items():
            self._further.labels(name).set(value)
        self._seconds.observe(figures.step_seconds)
        known = {
            "forward": figures.forward_seconds,
            "backward": figures.backward_seconds,
            "optimizer": figures.optimizer_seconds,
        }
        for part, seconds in (known | {"other": max(0.0, figures.step_seconds - sum(known.values()))}).items():
            self._parts.labels(part).inc(seconds)
        for rank, size in enumerate(figures.peak_memory_bytes):
            self._memory.labels(str(rank)).set(size)

    def collect(self) -> Iterator[GaugeMetricFamily | SummaryMetricFamily]:
        """Metrics that are read at scrape time (prometheus_client's collector protocol)."""
        jobs = GaugeMetricFamily("apollo_jobs", "Jobs by state", labels=["state"])
        for state, count in self._store.count_jobs().items():
            jobs.add_metric([state.value], count)
        yield jobs
        link = self._scheduler.link
        yield GaugeMetricFamily("apollo_trainer_connected", "1 while rank 0 is connected", value=float(link.connected))
        yield GaugeMetricFamily(
            "apollo_weight_version", "Completed updates of the served weights", value=link.weight_version or 0
        )
        unsaved = bool(self._store.get_meta("unsaved"))
        yield GaugeMetricFamily("apollo_unsaved", "1 while no checkpoint has the served weights", value=float(unsaved))
        yield from _replicas(link)
        yield from _clients(self._latency.last)
        speed = self._scheduler.progress.tokens_per_second() if self._scheduler.running else None
        yield GaugeMetricFamily("apollo_tokens_per_second", "Tokens per second of the running job", value=speed or 0.0)


def _replicas(link: RankLink) -> Iterator[GaugeMetricFamily]:
    """Of each served replica whether a trainer keeps it in step, its weight version and its lag; none before a trainer."""
    if link.hello is None:
        return
    labels = ["instance", "host"]
    in_step = GaugeMetricFamily("apollo_replica_in_step", "1 while a trainer keeps the replica in step", labels=labels)
    version = GaugeMetricFamily("apollo_replica_weight_version", "Weight version of the replica", labels=labels)
    lag = GaugeMetricFamily(
        "apollo_replica_lag_seconds", "How much later than the first the replica had the last weights", labels=labels
    )
    for replica in replicas_view(link):
        names = [replica["instance_id"], replica["host"]]
        in_step.add_metric(names, float(replica["health"] == "in_step"))
        version.add_metric(names, replica["weight_version"] or 0)
        if replica["lag_seconds"] is not None:
            lag.add_metric(names, replica["lag_seconds"])
    yield from (in_step, version, lag)
    yield GaugeMetricFamily(
        "apollo_replicas_wanted", "Replicas that are to be trained", value=float(link.hello.num_replicas)
    )


def _clients(figures: Figures | None) -> Iterator[GaugeMetricFamily | SummaryMetricFamily]:
    """The server's own figures at the last look at them, since it started; none without a look."""
    if figures is None:
        return
    if figures.requests_running is not None:
        running = figures.requests_running
        yield GaugeMetricFamily("apollo_client_requests_running", "Requests that the server answers", value=running)
    for name, text, mean in (
        ("inter_token", "Time between tokens of the server's answers", figures.inter_token_seconds),
        ("first_token", "Time to the first token of the server's answers", figures.first_token_seconds),
    ):
        if mean is not None:
            yield SummaryMetricFamily(
                f"apollo_client_{name}_seconds", text, count_value=int(mean.count), sum_value=mean.sum
            )


router = APIRouter(route_class=StrictRoute)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus text format."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
