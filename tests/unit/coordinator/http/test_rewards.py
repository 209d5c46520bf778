"""Jobs over sampled completions, over real HTTP against a real coordinator process: what rank 0 is sent and says."""

from __future__ import annotations

from apollo_tp.config import RlConfig
from tests.support.fakes import chat_stack

ONE = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "sampling_logprobs": [-0.5, -1.0]}


def _sent(ranks, job):
    return [command for command in ranks.commands if getattr(command, "job_id", "") == job["id"]]


def test_the_loss_and_the_samples_reach_the_ranks(stack):
    client, ranks = stack
    samples = [ONE | {"reward": float(i), "group": "a", "weight_version": 3, "temperature": 0.5} for i in range(4)]
    config = {"clip_high": 0.3, "mask_low": 0.5}
    body = {"samples": samples, "loss": "ppo", "loss_config": config, "batch_size": 4, "wait": True}
    job = client.post("/train", json=body).json()
    assert (job["state"], job["spec"]["loss"]["name"]) == ("succeeded", "ppo")
    (command,) = _sent(ranks, job)
    assert (command.loss.name, command.loss.config.clip_low, command.loss.config.clip_high) == ("ppo", 0.2, 0.3)
    assert command.max_staleness is None
    assert [sample.sampled.advantages[0] > 0 for sample in command.samples] == [False, False, True, True]
    assert command.samples[0].sampled.weight_version == 3
    assert command.samples[0].weights == [0.0, 0.0, 1.0, 1.0]


def test_ordinary_jobs_have_the_ordinary_loss(stack):
    client, ranks = stack
    job = client.post("/train", json={"context_ids": [1], "continuation_ids": [2], "wait": True}).json()
    (command,) = _sent(ranks, job)
    assert command.loss.name == "cross_entropy"
    assert command.samples[0].sampled.sampling_logprobs == []


def test_a_dry_run_shows_advantages(stack):
    client, _ = stack
    samples = [ONE | {"reward": float(i), "group": "a"} for i in range(2)]
    body = {"samples": samples, "loss": "gspo", "loss_config": {"group_std": False}}
    shown = client.post("/train?dry_run=true", json=body).json()["samples"]
    assert [sample["sampled"]["advantages"] for sample in shown] == [[-0.5, -0.5], [0.5, 0.5]]
    plain = client.post("/train?dry_run=true", json={"context_ids": [1], "continuation_ids": [2]}).json()["samples"]
    assert "sampled" not in plain[0]


def test_refusals_name_sample_and_field(stack):
    client, ranks = stack
    before = len(ranks.commands)
    for body, field in (
        ({"samples": [ONE | {"advantage": 1.0}, ONE], "loss": "ppo"}, "samples[1].advantage"),
        ({"samples": [ONE | {"advantage": 1.0}]}, "samples[0].sampling_logprobs"),
        (ONE | {"advantage": 1.0, "top_p": 0.9, "loss": "ppo"}, "top_p"),
        (ONE | {"advantage": 1.0, "loss": "ppo", "loss_config": {"beta": 1.0}}, "loss_config.beta"),
        ({"samples": [ONE], "loss": "ppo", "advantage": 1.0}, "advantage"),
    ):
        answer = client.post("/train", json=body)
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    assert len(ranks.commands) == before


def test_scores_of_tokens(stack):
    """One per token of the sequence, null for those without a weight; only if asked for."""
    client, _ = stack
    samples = [ONE | {"weights": [1.0, 0.0]}, {"context_ids": [7], "continuation_ids": [8]}]
    first, second = client.post("/train/score", json={"samples": samples, "per_token": True}).json()["data"]
    assert first["token_logprobs"] == [None, None, -0.03, None]
    assert second["token_logprobs"] == [None, -0.08]
    plain = client.post("/train/score", json={"samples": samples}).json()["data"]
    assert "token_logprobs" not in plain[0]


def test_old_samples_are_dropped_where_it_is_set(tmp_path):
    with chat_stack(tmp_path, settings={"rl": RlConfig(max_staleness=4)}) as (client, ranks, _):
        job = client.post("/train", json=ONE | {"advantage": 1.0, "loss": "ppo", "wait": True}).json()
        (command,) = _sent(ranks, job)
        assert command.max_staleness == 4
