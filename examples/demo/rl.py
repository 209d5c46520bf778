"""Learn from a reward: a small model on real vLLM at TP = 2 was taught to answer with one of five digits, and learns to
answer with the largest, from a Python function that grades what the server sampled. Once with sync=step_lock, once with
sync=hogwild.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from apollo_tp.client import Client, Job, Sample
from examples.demo.common import Demo, console, post
from tests.support.demo_model import make_model
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer

NUM_RANKS = 2
NUM_CLIENTS = 2
"""Loops that run at once, so that answers are sampled while weights are written: what the modes differ in."""
MODES = {"step_lock": ["sync=step_lock", "cache=reset"], "hogwild": ["sync=hogwild", "cache=none"]}
OPTIONS = [
    "rl.max_staleness=8", "optim.lr=3e-3", "optim.max_relative_update=1", "train.max_sequence_tokens=256",
    "checkpoint.after_idle_seconds=null",
]  # fmt: skip
NUM_DIGITS, NUM_HELDOUT = 5, 200
TAUGHT_STEPS, TAUGHT_BATCH, TAUGHT_BATCHES = 120, 64, 40
PROMPTS, ANSWERS = 16, 8
MAX_TOKENS = 4
START_SECONDS = 300.0
Reward = Callable[[str, str], float]
"""Of a prompt and an answer."""
OUTPUTS = (
    "model", "checkpoints", "rewards.png", "result.json",
    *(f"{what}{mode}{suffix}" for mode in MODES for what, suffix in (("", ""), ("server-", ".log"), ("trainer-", ".log"))),
)  # fmt: skip


def learn(trainer: Client, vllm: httpx.Client, prompts: list[str], reward: Reward, steps: int) -> Iterator[Job]:
    """Sample answers, grade them, train on them, and again: the next ones come from the new weights."""
    asks = {"model": "demo", "n": ANSWERS, "max_tokens": MAX_TOKENS, "logprobs": 0, "return_token_ids": True}
    for _ in range(steps):
        asked, version = random.sample(prompts, PROMPTS), trainer.status().trainer.weight_version
        answer = vllm.post("/v1/completions", json=asks | {"prompt": asked}).raise_for_status()
        samples = [
            Sample(
                prompt_ids=choice["prompt_token_ids"],
                completion_ids=choice["token_ids"],
                sampling_logprobs=choice["logprobs"]["token_logprobs"],
                reward=reward(asked[number // ANSWERS], choice["text"]),
                group=number // ANSWERS,
                weight_version=version,
            )
            for number, choice in enumerate(answer.json()["choices"])
        ]
        job = trainer.submit(samples, loss="ppo", batch_size=len(samples), learning_rate_scale=0.3)
        yield trainer.wait(job.id)


def largest(prompt: str, answer: str) -> float:
    """The reward: 1 for the largest digit of the prompt, else 0."""
    return float(answer.strip() == max(prompt.split()[:-1]))


def prompts() -> tuple[list[str], list[str]]:
    """Prompts to train on, and held-out ones: ``3 9 4 1 7 >``."""
    found = [" ".join(digits) + " >" for digits in itertools.permutations("0123456789", NUM_DIGITS)]
    random.Random(0).shuffle(found)
    return found[NUM_HELDOUT:], found[:NUM_HELDOUT]


@dataclass
class Stack:
    """A server at TP = 2, and its trainer with the options of ``mode``."""

    out: Path
    runtime_dir: Path
    mode: str
    url: str = ""
    service: str = ""
    processes: list[ManagedProcess] = field(default_factory=list)

    def start(self, model: Path, server_args: list[str]) -> None:
        """Serve ``model``, and wait until the trainer is connected."""
        console.print(f"{self.mode}: starting vLLM, TP = {NUM_RANKS}, and the trainer ...")
        port, log = free_port(), self.out / f"server-{self.mode}.log"
        extra = ["--dtype", "float32", "--max-num-seqs", str(PROMPTS * ANSWERS), "--enable-scale-out",
                 "--logprobs-mode", "processed_logprobs", *server_args]  # fmt: skip
        server = start_server(
            model, port, self.runtime_dir, log, tensor_parallel=NUM_RANKS, instance=self.mode, extra=extra
        )
        self.processes.append(server)
        self.url = f"http://127.0.0.1:{port}"
        server.wait_for(f"{self.url}/health", START_SECONDS)
        state, log, options = self.out / self.mode, self.out / f"trainer-{self.mode}.log", [*MODES[self.mode], *OPTIONS]
        trainer = start_trainer(self.runtime_dir, state, log, num_ranks=NUM_RANKS, overrides=options)
        self.processes.append(trainer)
        self.service = coordinator_url(self.runtime_dir, trainer, instance=self.mode, seconds=START_SECONDS)

    def teach(self, prompts: list[str]) -> Path:
        """Supervised steps on answers that are any digit of their prompts; returns the folder of the weights."""
        draw = random.Random(1)
        samples = [
            Sample(prompt=prompt, completion=" " + draw.choice(prompt.split()[:-1]))
            for prompt in draw.sample(prompts, TAUGHT_BATCH * TAUGHT_BATCHES)
        ]
        with Client(self.service) as trainer:
            job = trainer.submit(samples, batch_size=TAUGHT_BATCH, epochs=TAUGHT_STEPS, max_steps=TAUGHT_STEPS)
            job = trainer.wait(job.id)
        console.print(f"{self.mode}: {job.step} supervised steps, loss {job.loss:.3f}")
        return Path(post(f"{self.service}/checkpoint", {"wait": True})["path"])

    def mean_reward(self, prompts: list[str]) -> float:
        """Of several sampled answers to each prompt."""
        body = {"model": "demo", "prompt": prompts, "max_tokens": MAX_TOKENS, "n": ANSWERS}
        answers = post(f"{self.url}/v1/completions", body)["choices"]
        return statistics.mean(largest(prompts[index // ANSWERS], each["text"]) for index, each in enumerate(answers))

    def learn(self, prompts: list[str], steps: int) -> list[Job]:
        """``steps`` steps of all loops together; returns their jobs as they ended."""
        jobs: list[Job] = []

        def loop(count: int) -> None:
            with Client(self.service) as trainer, httpx.Client(base_url=self.url, timeout=120) as vllm:
                for job in learn(trainer, vllm, prompts, largest, count):
                    jobs.append(job)
                    if len(jobs) % 10 == 0:
                        console.print(f"{self.mode}: step {len(jobs)}, reward {job.metrics['reward_mean']:.3f}")

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            list(pool.map(loop, [(steps + number) // NUM_CLIENTS for number in range(NUM_CLIENTS)]))
        return jobs

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()


def run(out: Path, runtime_dir: Path, num_steps: int, server_args: list[str]) -> dict[str, Any]:
    """Run the demo in an empty folder; returns the figures, each by mode."""
    trained, heldout = prompts()
    model = out / "model"
    make_model(model, trained, vocab_size=300, num_layers=2, dtype=torch.float32)
    figures: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[Job]] = {}
    for mode in MODES:
        stack = Stack(out, runtime_dir, mode)
        try:
            stack.start(model, server_args)
            if not curves:
                model = stack.teach(trained)  # the other mode begins with the same weights
            before, started = stack.mean_reward(heldout), time.monotonic()
            curves[mode] = stack.learn(trained, num_steps)
            seconds = time.monotonic() - started
            figures[mode] = _figures(curves[mode], before, stack.mean_reward(heldout), seconds)
        finally:
            stack.stop()
    _plot(curves, out / "rewards.png")
    return {name: {mode: figures[mode][name] for mode in MODES} for name in figures["step_lock"]}


def _figures(jobs: list[Job], before: float, after: float, seconds: float) -> dict[str, Any]:
    return {
        "heldout_reward_before": before,
        "heldout_reward_after": after,
        "train_steps": len(jobs),
        "seconds_per_step": seconds / len(jobs),
        "mismatch_kl_mean": statistics.mean(_metric(jobs, "mismatch_kl")),
        "mismatch_kl_median": statistics.median(_metric(jobs, "mismatch_kl")),
        "mismatch_kl_max_of_a_token": max(_metric(jobs, "mismatch_kl_max")),
        "clip_fraction": statistics.mean(_metric(jobs, "clip_fraction")),
    }


def _metric(jobs: list[Job], name: str) -> list[float]:
    """A figure of every step; NaN where it was not finite, so that a promise about it is broken."""
    return [float("nan") if (value := job.metrics[name]) is None else value for job in jobs]


def _plot(curves: dict[str, list[Job]], path: Path) -> None:
    """Mean reward of each step's answers, and their mismatch, of both modes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for mode, jobs in curves.items():
        left.plot(_metric(jobs, "reward_mean"), label=f"sync={mode}", linewidth=1.2)
        # not a line: samples of the present weights and those of the weights before are orders of magnitude apart
        right.semilogy(_metric(jobs, "mismatch_kl"), ".", label=f"sync={mode}", markersize=5)
    left.set(xlabel="step", ylabel="mean reward of the sampled answers", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="mismatch KL (nats per token)")
    left.legend(loc="lower right")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _promises_held(result: dict[str, Any]) -> bool:
    before, after = result["heldout_reward_before"], result["heldout_reward_after"]
    return all(before[mode] < 0.3 and after[mode] > 0.8 for mode in MODES)


DEMO = Demo(
    "examples.demo.rl", __doc__, "apollo_tp demo: a vLLM server at TP = 2 learns from a reward", OUTPUTS, run,
    _promises_held, num_steps=80,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(DEMO.main())
