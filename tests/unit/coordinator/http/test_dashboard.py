"""The Grafana dashboard in deploy/: what it asks for is what a coordinator's /metrics has."""

import itertools
import json
import re
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from apollo_tp.wire import commands
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.http_server import served, vllm_metrics
from tests.support.jobs import ends

DASHBOARD = json.loads((Path(__file__).parents[4] / "deploy/grafana/dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
OF_PROMETHEUS = {"instance", "exported_instance"}
"""Labels that Prometheus adds: the coordinator's address, and our own label of that name under another one."""
SAMPLED = {
    "prompt_ids": [1, 2], "completion_ids": [3, 4], "sampling_logprobs": [-0.5, -0.5], "advantage": 1.0, "reward": 0.25,
    "loss": "ppo",
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """What /metrics of a real coordinator has after a job of two replicas, with a server whose latency it looks at."""
    folder = tmp_path_factory.mktemp("coordinator")
    with served(vllm_metrics) as url, CoordinatorProcess(folder, server_url=url) as coordinator:
        ranks = FakeRanks(coordinator.ranks_socket, folder / "journal")
        ranks.replicas, ranks.lags = (
            [commands.Replica("first", "here"), commands.Replica("second", "there")],
            [0.0, 0.25],
        )
        with ranks, coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            assert ends(client, client.post("/train", json=SAMPLED).json()["id"])["state"] == "succeeded"
            wait_for(lambda: "apollo_client_" in client.get("/metrics").text)
            families = list(text_string_to_metric_families(client.get("/metrics").text))
    return [sample for family in families for sample in family.samples]


def parsed(expression):
    """The expression as Prometheus reads it, once Grafana has put values in place of its variables."""
    return promql_parser.parse(expression.replace("$__rate_interval", "1m").replace("$coordinator", ".*"))


def selectors(node):
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("vector_selector", "expr", "lhs", "rhs", "args"):
        below = getattr(node, name, None)
        for each in below if isinstance(below, list) else [below] * (below is not None):
            yield from selectors(each)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_is_there(samples, expression):
    """With the labels that it is chosen by, in the values that it is chosen for."""
    found = list(selectors(parsed(expression)))
    assert len(found) == len(re.findall(r"\bapollo_", expression)) > 0
    for selector in found:
        wanted = [m for m in selector.matchers.matchers if m.name not in OF_PROMETHEUS]
        patterns = {m.name: m.value if m.op == promql_parser.MatchOp.Re else re.escape(m.value) for m in wanted}
        assert any(
            sample.name == selector.name
            and all(re.fullmatch(pattern, sample.labels.get(name, "")) for name, pattern in patterns.items())
            for sample in samples
        ), f"/metrics has no {selector}"


def test_legends_and_sums_name_labels_that_are_there(samples):
    labels = {name for sample in samples for name in sample.labels} | OF_PROMETHEUS
    for target in (target for panel in DASHBOARD["panels"] for target in panel["targets"]):
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        for words in re.findall(r"\bby \(([^)]*)\)", target["expr"]):
            named |= set(words.replace(" ", "").split(","))
        assert named <= labels, target


def test_it_shows_what_one_watches():
    """Loss, speed, steps, queue, weight version, clients, replicas, skipped steps, checkpoints and errors."""
    asked = " ".join(EXPRESSIONS)
    for name in ("loss_nats", "tokens_per_second", "steps_total", "jobs", "weight_version", "client_inter_token_seconds_sum",
                 "replica_lag_seconds", "checkpoints_total", "trainer_connected"):  # fmt: skip
        assert f"apollo_{name}{{" in asked
    assert 'outcome="skipped"' in asked
    assert 'state="failed"' in asked


def test_it_can_be_provisioned():
    """What Grafana reads of a file: an id of its own making, a uid that stays, panels in its grid that do not overlap, and a
    data source that is chosen in the dashboard, since its uid differs from installation to installation."""
    assert DASHBOARD["id"] is None
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"]
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert {"from", "to"} == DASHBOARD["time"].keys()
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["coordinator"]["datasource"] == source
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = []
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert x + w <= 24
        taken += itertools.product(range(x, x + w), range(y, y + h))
    assert len(set(taken)) == len(taken)
