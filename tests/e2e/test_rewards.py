"""The loop of docs/how-to/rewards.md, as it stands there, against a real server and a real trainer: rewards rise."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from apollo_tp.client import Client, Sample
from tests.support.demo_model import make_model, standard_library_text
from tests.support.processes import coordinator_url, free_port, start_server, start_trainer
from tests.support.servers import START_SECONDS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs/how-to/rewards.md"
STEPS, REWARDED = 15, 500


def _reward(choice: dict) -> float:
    """The share of tokens with a small id: about half at first."""
    return sum(token < REWARDED for token in choice["token_ids"]) / len(choice["token_ids"])


def test_the_loop_of_the_page_raises_the_mean_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    model, port = tmp_path / "model", free_port()
    make_model(model, standard_library_text(1000, 30), vocab_size=1003, num_layers=2)
    runtime_dir = tmp_path / "rt"
    runtime_dir.mkdir(mode=0o700)
    options = ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
    server = start_server(
        model, port, runtime_dir, tmp_path / "server.log", tensor_parallel=1, extra=options, forking=True
    )
    trainer = None
    try:
        url = f"http://127.0.0.1:{port}"
        server.wait_for(f"{url}/health", START_SECONDS)
        overrides = [
            "sync=step_lock", "cache=reset", "rl.max_staleness=8", "optim.lr=3e-3", "optim.max_relative_update=1",
            "train.max_sequence_tokens=256",
            "checkpoint.after_idle_seconds=null",
        ]  # fmt: skip
        trainer = start_trainer(
            runtime_dir, tmp_path, tmp_path / "trainer.log", num_ranks=1, overrides=overrides, forking=True
        )
        coordinator = coordinator_url(runtime_dir, trainer, seconds=START_SECONDS)
        names = {
            "TRAINER": coordinator, "SERVER": url, "MODEL": "demo", "STEPS": STEPS, "reward": _reward,
            "PROMPTS": [[40, 41, 42], [300, 17]], "ANSWERS": 32, "TOKENS": 4,
        }  # fmt: skip
        exec(compile(code, str(PAGE), "exec"), names)
        shown = re.findall(r"reward ([\d.]+), mismatch (\S+)$", capsys.readouterr().out, re.MULTILINE)
        rewards, mismatches = zip(*((float(a), float(b)) for a, b in shown), strict=True)
        print(rewards, mismatches)
        assert len(rewards) == STEPS
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
        assert max(mismatches) < 0.01, mismatches
        _check_versions(url, coordinator)
    finally:
        for process in (trainer, server):
            if process is not None:
                process.stop()


def _check_versions(server: str, trainer: str) -> None:
    """vLLM says which weights sampled a token; samples of weights that are too old are dropped."""
    body = {"token_ids": [40, 41], "sampling_params": {"max_tokens": 2, "temperature": 1.0}}
    answer = httpx.post(f"{server}/inference/v1/generate", json=body, timeout=60).raise_for_status().json()
    assert [span["version"] for span in answer["choices"][0]["weight_versions"]] == [str(STEPS)], answer
    one = Sample(prompt_ids=[40], completion_ids=[41, 42], sampling_logprobs=[-1.0, -1.0], advantage=1.0)
    old = Sample(prompt_ids=[40], completion_ids=[41], sampling_logprobs=[-1.0], advantage=1.0, weight_version=1)
    with Client(trainer) as client:
        job = client.wait(client.submit([one, old], loss="ppo").id)
        assert job.metrics["stale_samples"] == 1
        assert client.status().trainer.weight_version == STEPS + 1
