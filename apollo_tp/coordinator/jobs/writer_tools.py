"""The tools that figures are written for. Each is imported only if it is configured; what it refuses is a ConfigError."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from apollo_tp.config import ServiceConfig
from apollo_tp.errors import ConfigError

Figures = tuple[str, int, float, dict[str, float]]  # job id, weight version, Unix time, name -> value
Tool = tuple[Callable[[Figures], None], Callable[[], object]]
"""Writes the figures of a step; closes the tool."""

OTLP_PATH = "/v1/metrics"
SHUTDOWN_MILLISECONDS = 5000


def tensorboard(service: ServiceConfig) -> Tool:
    """An event file in ``writers.tensorboard_dir``."""
    folder = Path(str(service.writers.tensorboard_dir))
    what, install = "tensorboard_dir: got a folder", "tensorboard"
    event_pb2 = _imported("tensorboard.compat.proto.event_pb2", what, install)
    summary_pb2 = _imported("tensorboard.compat.proto.summary_pb2", what, install)
    event_file_writer = _imported("tensorboard.summary.writer.event_file_writer", what, install)
    try:
        events = event_file_writer.EventFileWriter(str(folder))
    except OSError as error:
        raise ConfigError(
            f"service.writers.tensorboard_dir: got {folder} ({error.strerror or error}), expected a writable folder"
        ) from error

    def write(figures: Figures) -> None:
        _, version, now, values = figures
        value = [summary_pb2.Summary.Value(tag=f"apollo/{name}", simple_value=v) for name, v in values.items()]
        summary = summary_pb2.Summary(value=value)
        events.add_event(event_pb2.Event(wall_time=now, step=version, summary=summary))

    return write, events.close


def wandb(service: ServiceConfig) -> Tool:
    """A run of ``writers.wandb_project``."""
    tool = _imported("wandb", "wandb_project: got a project", "wandb")
    settings: dict[str, Any] = {"project": service.writers.wandb_project, "mode": service.writers.wandb_mode}
    try:
        run = tool.init(dir=service.state_dir, **settings)
    except (OSError, tool.Error) as error:
        raise ConfigError(
            f"service.writers.wandb_project: got {service.writers.wandb_project!r}, which wandb refuses ({error}), expected "
            "a project that it can open; see service.writers.wandb_mode"
        ) from error

    def write(figures: Figures) -> None:
        job_id, version, _, values = figures
        run.log(values | {"job": job_id}, step=version)

    return write, run.finish


def mlflow(service: ServiceConfig) -> Tool:
    """A run of ``writers.mlflow_experiment`` in the tracking store ``writers.mlflow_uri``. It begins with the first figures:
    a tracking server that does not answer would hold up the start for minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a trainer asks no host that it was not told of
    tool = _imported("mlflow", "mlflow_uri: got a tracking store", "mlflow-skinny")
    entities = import_module("mlflow.entities")
    uri, experiment = service.writers.mlflow_uri, service.writers.mlflow_experiment
    try:
        client = tool.MlflowClient(tracking_uri=uri)
    except (OSError, ImportError, tool.MlflowException) as error:
        raise ConfigError(
            f"service.writers.mlflow_uri: got {uri!r}, which mlflow refuses ({error}), expected the address of a tracking "
            "server (http://HOST:PORT), or a store that the installed mlflow can write"
        ) from error
    run_ids: list[str] = []
    jobs: list[str] = []

    def begin() -> str:
        found = client.get_experiment_by_name(experiment)
        return str(
            client.create_run(found.experiment_id if found else client.create_experiment(experiment)).info.run_id
        )

    def write(figures: Figures) -> None:
        job_id, version, now, values = figures
        if not run_ids:
            run_ids.append(begin())
        if jobs[-1:] != [job_id]:
            jobs.append(job_id)
            client.set_tag(run_ids[0], "job", job_id)
        metrics = [entities.Metric(name, value, int(now * 1000), version) for name, value in values.items()]
        client.log_batch(run_ids[0], metrics=metrics)

    return write, lambda: [client.set_terminated(run_id) for run_id in run_ids]


def otlp(service: ServiceConfig) -> Tool:
    """Gauges ``apollo.<name>`` of the last step, sent to ``writers.otlp_endpoint`` at an interval. What else OpenTelemetry
    reads from its own variables (OTEL_METRIC_EXPORT_INTERVAL, OTEL_EXPORTER_OTLP_HEADERS and so on) holds too."""
    what, install = "otlp_endpoint: got an address", "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
    exporters = _imported("opentelemetry.exporter.otlp.proto.http.metric_exporter", what, install)
    metrics = _imported("opentelemetry.sdk.metrics", what, install)
    export = _imported("opentelemetry.sdk.metrics.export", what, install)
    resources = _imported("opentelemetry.sdk.resources", what, install)
    endpoint = str(service.writers.otlp_endpoint).rstrip("/")
    exporter = exporters.OTLPMetricExporter(endpoint if endpoint.endswith(OTLP_PATH) else endpoint + OTLP_PATH)
    provider = metrics.MeterProvider(
        [export.PeriodicExportingMetricReader(exporter)],
        resources.Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "apollo-tp")}),
        shutdown_on_exit=False,
    )
    meter = provider.get_meter("apollo_tp")
    gauges: dict[str, Any] = {}

    def write(figures: Figures) -> None:
        _, version, _, values = figures  # a job's id would be a new series for each job, which the SDK never forgets
        for name, value in {**values, "weight_version": float(version)}.items():
            if name not in gauges:
                gauges[name] = meter.create_gauge(f"apollo.{name}")
            gauges[name].set(value)

    return write, lambda: provider.shutdown(timeout_millis=SHUTDOWN_MILLISECONDS)


def _imported(module: str, what: str, install: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"service.writers.{what}, but {error}; pip install {install}") from error
