"""What /metrics says after some steps: every figure of a step in its metric; and that the page of metrics has each."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apollo_tp.coordinator.http.metrics import Metrics
from apollo_tp.coordinator.http.server_metrics import LatencyHistory
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.wire import commands
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.http_server import served, vllm_metrics
from tests.support.jobs import ONE, ends

PAGE = Path(__file__).parents[4] / "docs/reference/metrics.md"
STEPS = 2
STEP_SECONDS = 0.5


def metrics_of(text: str) -> dict[str, tuple[str, str, set[str]]]:
    """Type, help and labels by name, as a scrape has them."""
    helps = dict(re.findall(r"^# HELP (\w+) (.*)$", text, re.MULTILINE))
    kinds = dict(re.findall(r"^# TYPE (\w+) (.*)$", text, re.MULTILINE))
    labels = {
        name: set(re.findall(r'(\w+)="', found)) for name, found in re.findall(r"^(\w+)\{(.*)\}", text, re.MULTILINE)
    }
    labels |= {"apollo_step_figure": {"name"}}  # this step has none
    return {
        name: (kinds[name], helps[name], labels.get(name, set())) for name in helps if not name.endswith("_created")
    }


def metrics_of_the_page() -> dict[str, tuple[str, str, set[str]]]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, text, set(re.findall(r"\w+", labels))) for name, kind, labels, text in rows}


def test_every_figure_of_a_step_is_in_its_metric(tmp_path):
    """The figures are those that the fake rank 0 reports; see FakeRanks._step."""
    with chat_stack(tmp_path, step_seconds=STEP_SECONDS) as (client, *_):
        job = client.post("/train", json=ONE | {"epochs": STEPS}).json()["id"]
        assert ends(client, job)["state"] == "succeeded"
        families = text_string_to_metric_families(client.get("/metrics").text)
        found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert {name: found[name,] for name in ("apollo_tokens_total", "apollo_loss_tokens_total")} == {
        "apollo_tokens_total": 4 * STEPS,
        "apollo_loss_tokens_total": 2 * STEPS,
    }
    parts = {part: found["apollo_step_part_seconds_total", part] for part in ("forward", "backward", "optimizer")}
    assert parts == pytest.approx({"forward": 0.1 * STEPS, "backward": 0.2 * STEPS, "optimizer": 0.05 * STEPS})
    other = found["apollo_step_part_seconds_total", "other"]
    assert sum(parts.values()) + other == pytest.approx(found["apollo_step_seconds_sum",]) == STEP_SECONDS * STEPS
    expected = {
        ("apollo_steps_total", "completed"): STEPS,
        ("apollo_step_seconds_count",): STEPS,
        ("apollo_loss_nats",): 5.0 / (1 + STEPS),
        ("apollo_token_accuracy",): 0.5,
        ("apollo_grad_norm",): 1.0,
        ("apollo_learning_rate",): 1e-5,
        ("apollo_padding_share",): 0.25,
        ("apollo_peak_memory_bytes", "0"): 1000,
        ("apollo_peak_memory_bytes", "1"): 2000,
        ("apollo_jobs", "succeeded"): 1,
        ("apollo_jobs", "queued"): 0,
        ("apollo_trainer_connected",): 1,
        ("apollo_weight_version",): STEPS,
        ("apollo_tokens_per_second",): 0.0,  # no job runs
    }
    assert {name: found[name] for name in expected} == expected


def test_each_replica_has_a_version_and_a_lag(tmp_path):
    """In /metrics and in /train/status, also how many are away; a lag is that of the last step, and none before one. All
    metrics are there then, as docs/reference/metrics.md has them."""
    with (
        served(vllm_metrics) as url,
        CoordinatorProcess(tmp_path, server_url=url) as coordinator,
        coordinator.client() as client,
    ):
        ranks = FakeRanks(coordinator.ranks_socket, tmp_path / "journal")
        ranks.replicas, ranks.lags = (
            [commands.Replica("first", "here"), commands.Replica("second", "there")],
            [0.0, 0.25],
        )
        with ranks:
            wait_for(lambda: client.get("/health").json()["trainer"])
            before = client.get("/train/status").json()["trainer"]["replicas"]
            body = {"samples": [{"context_ids": [5, 6], "continuation_ids": [7, 8]}]}
            assert ends(client, client.post("/train", json=body).json()["id"])["state"] == "succeeded"
            after = client.get("/train/status").json()["trainer"]["replicas"]
            wait_for(lambda: "apollo_client_" in client.get("/metrics").text)
            text = client.get("/metrics").text
    assert before[1] == {
        "instance_id": "second", "host": "there", "weight_version": 0, "lag_seconds": None, "health": "in_step"
    }  # fmt: skip
    assert after[1] == before[1] | {"weight_version": 1, "lag_seconds": 0.25}
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    labels = '{host="there",instance="second"}'
    assert found[f"apollo_replica_lag_seconds{labels}"] == 0.25
    assert found[f"apollo_replica_weight_version{labels}"] == found[f"apollo_replica_in_step{labels}"] == 1
    assert found["apollo_replicas_wanted"] == 3
    assert (found["apollo_client_inter_token_seconds_sum"], found["apollo_client_inter_token_seconds_count"]) == (
        1.5,
        40,
    )
    assert metrics_of_the_page() == metrics_of(text)


def test_checkpoints_are_counted_by_outcome(tmp_path):
    """From zero on; a written one ends that the served weights are not saved."""
    names = (
        'apollo_checkpoints_total{outcome="succeeded"}',
        'apollo_checkpoints_total{outcome="failed"}',
        "apollo_unsaved",
    )

    def found(client):
        lines = client.get("/metrics").text.splitlines()
        values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        return [values[name] for name in names]

    with chat_stack(tmp_path) as (client, ranks, _):
        assert found(client) == [0, 0, 0]
        assert ends(client, client.post("/train", json=ONE).json()["id"])["state"] == "succeeded"
        assert found(client)[2] == 1
        ranks.fail_saves = True
        assert client.post("/checkpoint", json={"wait": True}).json()["state"] == "failed"
        ranks.fail_saves = False
        before = found(client)
        assert client.post("/checkpoint", json={"wait": True}).json()["state"] == "succeeded"
        assert found(client) == [before[0] + 1, 1, 0]


@pytest.mark.parametrize(
    ("connected", "version", "running", "speed"),
    [(False, None, None, 12.5), (True, 0, "job", None), (True, 7, "job", 12.5)],
)
def test_gauges_are_those_of_the_moment(tmp_path, connected, version, running, speed):
    """Read at each scrape: a trainer that is gone is not shown as connected, nor the speed of a job that is over."""
    link = SimpleNamespace(connected=connected, weight_version=version, hello=None)
    progress = SimpleNamespace(tokens_per_second=lambda: speed)
    saver = SimpleNamespace(on_finished=[])
    scheduler = SimpleNamespace(
        link=link, running=running, progress=progress, on_step=[], on_evaluation=[], saver=saver
    )
    latency = LatencyHistory(None, lambda: False)
    with contextlib.closing(Store(tmp_path)) as store:
        families = list(Metrics(scheduler, store, latency).registry.collect())
    found = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    assert found["apollo_trainer_connected"] == connected
    assert found["apollo_weight_version"] == (version or 0)
    assert found["apollo_tokens_per_second"] == ((speed or 0.0) if running else 0.0)
