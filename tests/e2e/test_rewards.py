"""Rewards rise on a real server with a real trainer: by the loop of docs/how-to/rewards.md, as it stands there, and by
OpenAI's reinforcement method through the `openai` package, while coordinator and trainer are killed."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from apollo_tp.client import Client, Sample
from apollo_tp.launch.compose import quoted
from tests.support.demo_model import make_model, standard_library_text
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer
from tests.support.servers import START_SECONDS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs/how-to/rewards.md"
STEPS, REWARDED = 25, 500
OVERRIDES = [
    "sync=step_lock", "cache=reset", "rl.max_staleness=8", "optim.lr=3e-3", "optim.max_relative_update=1",
    "train.max_sequence_tokens=256", "checkpoint.after_idle_seconds=null", "rl.max_completion_tokens=4", "rl.completions=16",
]  # fmt: skip
GRADER = {"type": "string_check", "name": "letter", "input": "{{sample.output_text}}", "reference": "{{item.letter}}",
          "operation": "ilike"}  # fmt: skip
QUESTIONS = ("Which one?", "And now?", "Another.", "import")


class Stack:
    """One server for all tests of this file, and a trainer that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runtime_dir, port = folder, folder / "rt", free_port()
        self.runtime_dir.mkdir(mode=0o700)
        make_model(folder / "model", standard_library_text(1000, 30), vocab_size=1003, num_layers=2)
        options = ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
        self.url, log = f"http://127.0.0.1:{port}", folder / "server.log"
        self.server = start_server(
            folder / "model", port, self.runtime_dir, log, tensor_parallel=1, extra=options, forking=True
        )
        self.trainer: ManagedProcess | None = None
        self.untrained = ""
        """The checkpoint of the weights that no test has trained."""

    def train(self) -> None:
        """Start the trainer."""
        overrides = [*OVERRIDES, quoted("service.server_url", self.url)]
        log = self.folder / f"trainer{time.time_ns()}.log"
        self.trainer = start_trainer(self.runtime_dir, self.folder, log, num_ranks=1, overrides=overrides, forking=True)
        self.coordinator = coordinator_url(self.runtime_dir, self.trainer, seconds=START_SECONDS)

    def kill_coordinator(self) -> None:
        assert self.trainer is not None
        children = psutil.Process(self.trainer.process.pid).children(recursive=True)
        (process,) = (child for child in children if "apollo_tp.coordinator" in child.cmdline())
        process.kill()
        process.wait(10)
        self.coordinator = coordinator_url(self.runtime_dir, self.trainer, seconds=START_SECONDS)

    def kill_trainer(self) -> None:
        assert self.trainer is not None
        launcher = psutil.Process(self.trainer.process.pid)
        processes = [launcher, *launcher.children(recursive=True)]  # a rank has a process group of its own
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.trainer.stop()
        _, left = psutil.wait_procs(processes, timeout=30)
        assert not left
        self.train()

    def stop(self) -> None:
        for process in (self.trainer, self.server):
            if process is not None:
                process.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("rewards"))
    try:
        stack.server.wait_for(f"{stack.url}/health", START_SECONDS)
        stack.train()
        with Client(stack.coordinator) as client:
            stack.untrained = client.checkpoint().name
        yield stack
    finally:
        stack.stop()


def _reward(choice: dict) -> float:
    """The share of tokens with a small id: about half at first."""
    return sum(token < REWARDED for token in choice["token_ids"]) / len(choice["token_ids"])


def test_the_loop_of_the_page_raises_the_mean_reward(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    names = {
        "TRAINER": stack.coordinator, "SERVER": stack.url, "MODEL": "demo", "STEPS": STEPS, "reward": _reward,
        "PROMPTS": [[40, 41, 42], [300, 17]], "ANSWERS": 32, "TOKENS": 4,
    }  # fmt: skip
    exec(compile(code, str(PAGE), "exec"), names)
    shown = re.findall(r"reward ([\d.]+), mismatch (\S+)$", capsys.readouterr().out, re.MULTILINE)
    rewards, mismatches = zip(*((float(a), float(b)) for a, b in shown), strict=True)
    print(rewards, mismatches)
    assert len(rewards) == STEPS
    # by 0.17 to 0.39 in five runs; without learning, the difference has a standard deviation of 0.03
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert max(mismatches) < 0.01, mismatches
    _check_versions(stack.url, stack.coordinator)


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


def _version(stack: Stack) -> int:
    with Client(stack.coordinator) as client:
        version = client.status().trainer.weight_version
        assert version is not None
        return version


def _openai(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=10)


def _until(stack: Stack, job_id: str, step: int, seconds: float = 120) -> dict[str, Any]:
    """The job, once it has completed that step; on the coordinator of the moment."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            job = httpx.get(f"{stack.coordinator}/train/jobs/{job_id}", timeout=10).raise_for_status().json()
            assert not job["error"], job
            if job["step"] >= step or job["finished_at"]:
                return job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def test_a_reinforcement_job_raises_its_reward_and_survives_kills(stack: Stack) -> None:
    """Every step is trained once, whoever was killed; its completions, rewards and examples are events of the job."""
    with Client(stack.coordinator) as trainer:
        trainer.restore(stack.untrained)  # the test before has taught it other tokens
    before, client = _version(stack), _openai(stack)
    lines = [{"messages": [{"role": "user", "content": each}], "letter": "s"} for each in QUESTIONS]
    file = client.files.create(file=("prompts.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="fine-tune")
    hyperparameters = {"n_epochs": 20, "batch_size": 4, "eval_interval": 10, "eval_samples": 8}
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=file.id,
        validation_file=file.id,
        method={"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": hyperparameters}},
    )
    assert not _until(stack, job.id, 4)["finished_at"]
    stack.kill_coordinator()
    assert not _until(stack, job.id, 9)["finished_at"]
    stack.kill_trainer()
    ended = _until(stack, job.id, 20)
    while not ended["finished_at"]:
        ended = _until(stack, job.id, 21)
    assert (ended["state"], ended["step"]) == ("succeeded", 20), ended
    assert _version(stack) - before == 20, "a step was trained twice or not at all"
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.method.reinforcement.grader.operation) == ("succeeded", "ilike")
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data[::-1]
    sampled = {
        event.data["step"]: event.data
        for event in events
        if event.data and {"completions", "reward_mean"} <= event.data.keys()
    }
    rewards = [sampled[step]["reward_mean"] for step in sorted(sampled)]
    print(rewards)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert sampled[1]["samples"][0]["prompt"] in QUESTIONS
    # that of step 10 is left out if the kill fell into it
    assert 20 in {event.data["step"] for event in events if "valid_reward_mean" in (event.data or {})}
    mismatches = [event.data["mismatch_kl"] for event in events if "mismatch_kl" in (event.data or {})]
    assert max(mismatches) < 0.01, "completions came from other weights than those that were trained"


def test_graders_are_tried_before_a_job(stack: Stack) -> None:
    graders = _openai(stack).fine_tuning.alpha.graders
    assert graders.validate(grader=GRADER).grader.type == "string_check"
    result = graders.run(grader=GRADER, item={"letter": "E"}, model_sample="yes")
    assert (result.reward, result.metadata.errors.other_error) == (1.0, False)
    judge = {"type": "score_model", "name": "judge", "model": "m", "input": [{"role": "user", "content": "?"}]}
    with pytest.raises(openai.BadRequestError, match=r"rl\.score_model_url"):
        graders.run(grader=judge, model_sample="yes")
