"""Writers by config: the curves are on disk, or at a receiver of this machine."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from apollo_tp.coordinator.jobs.writers import Writer
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.figures import step_figures

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}
SAMPLED = {
    "prompt_ids": [1, 2], "completion_ids": [3, 4], "sampling_logprobs": [-0.5, -0.5], "advantage": 1.0, "reward": 0.25,
    "loss": "ppo",
}  # fmt: skip


MLFLOW = Path(sys.prefix) / "mlflow"
"""Where `make setup` puts it: its own versions of what vLLM needs too (requirements-mlflow.lock)."""
STORE = {"PYTHONPATH": str(MLFLOW), "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
READ_RUNS = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
runs = client.search_runs([client.get_experiment_by_name(sys.argv[2]).experiment_id])
print(json.dumps([{
    "status": run.info.status, "job": run.data.tags["job"], "names": sorted(run.data.metrics),
    "loss": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")],
} for run in runs]))
"""
OPEN_STORES = """
import sys
from apollo_tp.config.service import ServiceConfig, WriterConfig
from apollo_tp.coordinator.jobs import writer_tools
from apollo_tp.errors import ConfigError
for uri in sys.argv[1:]:
    try:
        writer_tools.mlflow(ServiceConfig(writers=WriterConfig(mlflow_uri=uri)))
    except ConfigError as error:
        print(" ".join(str(error).split()))
"""


def process(folder, writers, env):
    """A coordinator with these writers. One that is forked would find modules where its origin does."""
    return CoordinatorProcess(folder, writers=writers, env=env, forked="PYTHONPATH" not in env)


def train(folder, sample=ONE, env=None, **writers):
    """Three steps with these writers; the coordinator is stopped after them. Returns the job's id."""
    with (
        process(folder, writers, {"WANDB_SILENT": "true"} | (env or {})) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal"),
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        job = client.post("/train", json=sample | {"epochs": 3, "wait": True}).json()
        assert job["state"] == "succeeded"
    return job["id"]


def test_tensorboard_gets_every_step(tmp_path):
    """The event file holds the loss of each weight version."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, tensorboard_dir=str(tmp_path / "tb"))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("apollo/loss")] == [
        (1, 2.5),
        (2, 5 / 3),
        (3, 1.25),
    ]
    assert [e.value for e in events.Scalars("apollo/tokens")] == [4, 8, 12]


def test_tensorboard_gets_the_figures_of_a_loss_over_sampled_tokens(tmp_path):
    """As they are in the events: rewards, mismatch and the like."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, SAMPLED, tensorboard_dir=str(tmp_path / "tb"))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("apollo/reward_mean")] == [0.25] * 3
    assert [e.value for e in events.Scalars("apollo/mismatch_kl")] == pytest.approx([0.01, 0.02, 0.03])


def test_tokens_go_on_over_a_restart(tmp_path):
    """Of the coordinator: its first job's tokens are counted by the second one's curve."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        train(tmp_path, tensorboard_dir=str(tmp_path / "tb"))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("apollo/tokens")][-3:] == [16, 20, 24]


def test_wandb_works_offline(tmp_path):
    """An offline run is written below the state folder; no network is needed."""
    pytest.importorskip("wandb")
    train(tmp_path, wandb_project="apollo")
    runs = list((tmp_path / "state" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    content = runs[0].read_bytes()
    for name in (b"loss", b"grad_norm", b"tokens"):
        assert name in content


@pytest.mark.slow
def test_mlflow_gets_every_step(tmp_path):
    """In a store of files: one run of the experiment, finished, with the loss of each weight version."""
    uri = str(tmp_path / "runs")
    job = train(tmp_path, env=STORE, mlflow_uri=uri, mlflow_experiment="chat")
    read = subprocess.run(
        [sys.executable, "-c", READ_RUNS, uri, "chat"], env=os.environ | STORE, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    (run,) = json.loads(read.stdout)
    assert (run["status"], run["job"]) == ("FINISHED", job)
    assert run["loss"] == [[1, 2.5], [2, pytest.approx(5 / 3)], [3, 1.25]]
    assert {"grad_norm", "tokens", "learning_rate", "step_seconds"} < set(run["names"])


@pytest.mark.slow
def test_a_tracking_server_that_does_not_answer_stops_no_job(tmp_path):
    """It costs its own curves, which the log says."""
    train(tmp_path, env=STORE, mlflow_uri="http://127.0.0.1:9")
    log = (tmp_path / "coordinator.log").read_text()
    assert "the mlflow writer stopped" in log
    assert "127.0.0.1" in log


@pytest.mark.slow
def test_a_store_that_mlflow_refuses_is_refused_with_its_option(tmp_path):
    """With MLflow's own reason: it writes files only where it is told that this is meant."""
    env = os.environ | STORE | {"MLFLOW_ALLOW_FILE_STORE": "false"}
    uris = [str(tmp_path / "runs"), "htp://host"]
    tried = subprocess.run(
        [sys.executable, "-c", OPEN_STORES, *uris], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    said = tried.stdout.splitlines()
    for uri, line in zip(uris, said, strict=True):
        assert line.startswith(f"service.writers.mlflow_uri: got '{uri}', which mlflow refuses (")
    assert "MLFLOW_ALLOW_FILE_STORE" in said[0]
    assert not (tmp_path / "runs").exists()


def test_a_collector_gets_the_last_figures(tmp_path):
    """By OTLP over HTTP, decoded by the package's own messages; what is left at the end is sent before the end. Headers,
    such as those with a key, and the service's name are taken from OpenTelemetry's variables."""
    service = pytest.importorskip("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, self.headers["x-key"], service.ExportMetricsServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"OTEL_EXPORTER_OTLP_HEADERS": "x-key=secret", "OTEL_RESOURCE_ATTRIBUTES": "host.name=here"}
        train(tmp_path, SAMPLED, env, otlp_endpoint=f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    path, key, message = received[-1]
    assert (path, key) == ("/v1/metrics", "secret")
    (resource,) = message.resource_metrics
    attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (attributes["service.name"], attributes["host.name"]) == ("apollo-tp", "here")
    (scope,) = resource.scope_metrics
    found = {metric.name: metric.gauge.data_points[0].as_double for metric in scope.metrics}
    expected = {
        "loss": 1.25,
        "tokens": 12,
        "weight_version": 3,
        "grad_norm": 1,
        "reward_mean": 0.25,
        "mismatch_kl": 0.03,
    }
    assert {name: found[f"apollo.{name}"] for name in expected} == pytest.approx(expected)


def test_a_collector_that_does_not_answer_stops_no_job(tmp_path):
    train(tmp_path, env={"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}, otlp_endpoint="http://127.0.0.1:9")
    assert "opentelemetry" in (tmp_path / "coordinator.log").read_text()


@pytest.mark.parametrize(
    ("module", "option", "value", "install"),
    [
        ("tensorboard", "tensorboard_dir", "tb", "pip install tensorboard"),
        ("mlflow", "mlflow_uri", "http://127.0.0.1:9", "pip install mlflow-skinny"),
        ("opentelemetry", "otlp_endpoint", "http://127.0.0.1:9", "pip install opentelemetry-sdk"),
    ],
)
def test_a_missing_tool_is_a_sentence(tmp_path, module, option, value, install):
    """Asked for a tool that is not installed, the coordinator refuses to start, with a message what to install."""
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / f"{module}.py").write_text(f"raise ImportError('No module named {module}')")
    env = {"PYTHONPATH": str(tmp_path / "block")}
    coordinator = process(tmp_path, {option: value}, env)
    with pytest.raises(AssertionError, match=rf"service\.writers\.{option}: got .*{install}"):
        coordinator.start()


def test_a_file_in_place_of_the_folder_is_refused_with_its_option(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tb").write_text("mine")
    coordinator = CoordinatorProcess(tmp_path, writers={"tensorboard_dir": str(tmp_path / "tb")})
    with pytest.raises(
        AssertionError, match=r"service\.writers\.tensorboard_dir: got .*/tb .*expected a writable folder"
    ):
        coordinator.start()
    assert "Traceback" not in coordinator.log_path.read_text()


def test_tokens_go_on_over_jobs():
    """As the axis does, the weight version."""
    written = []
    with Writer("test", written.append, lambda: None) as writer:
        for job_id, version in (("a", 1), ("a", 2), ("b", 3)):
            writer(SimpleNamespace(id=job_id, tokens=4), step_figures(weight_version=version))
    assert [(job, version, values["tokens"]) for job, version, _, values in written] == [
        ("a", 1, 4.0), ("a", 2, 8.0), ("b", 3, 12.0),
    ]  # fmt: skip
