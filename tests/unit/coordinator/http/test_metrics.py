"""What /metrics says after some steps: every figure of a step in its metric."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fakes import chat_stack
from tests.support.jobs import ONE, ends

STEPS = 2
STEP_SECONDS = 0.5


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
