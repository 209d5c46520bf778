"""One iteration of learning from rewards beside a live server, by its parts: rollout, training, update, other clients.

    python benchmarks/bench_online.py --out benchmarks/results       # 2 GPUs, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_online.py --tiny                         # rehearsal on any machine

An iteration samples 8 completions of 256 tokens for each of 64 prompts, gives them random rewards, and trains on all with
GRPO's advantages, one step per 64 sequences. ``update`` is what follows the last gradient of a step (the optimizer and the
write), ``first token`` the time of a request for one token after the job. ``other client`` is the time between two tokens of
one stream that runs all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, Served, Training, device_name, serving, training, write_results

from apollo_tp.client import Client, Sample

MODES = ("step_lock", "hogwild")
COLUMNS = {
    "rollout_seconds": "rollout s", "rollout_tokens_per_second": "sampled tokens/s", "train_seconds": "train s",
    "train_tokens_per_second": "trained tokens/s", "update_seconds": "update s a step", "paused_seconds": "paused s a step",
    "first_token_seconds": "first token s", "mismatch_kl": "mismatch KL", "idle_p50": "other client idle p50 ms",
    "train_p50": "training p50 ms", "train_p99": "training p99 ms",
}  # fmt: skip


class Stream:
    """A client that always has one completion streamed to it; ``gaps`` are times between tokens, with the time of each."""

    def __init__(self, url: str, prompt: list[int], num_tokens: int) -> None:
        self._url, self._body = url, {
            "model": "demo", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        self.gaps: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def between(self, begin: float, end: float) -> list[float]:
        return [gap for when, gap in self.gaps if begin <= when <= end]

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                with client.stream("POST", "/v1/completions", json=self._body) as answer:
                    last = None
                    for line in answer.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        now = time.monotonic()
                        if last is not None:
                            self.gaps.append((now, now - last))
                        last = now
                        if self._stop.is_set():
                            return


async def rollout(served: Served, prompts: list[list[int]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The completions of all prompts, with their tokens and log-probabilities."""
    body = {
        "model": "demo", "n": options.completions, "max_tokens": options.tokens, "ignore_eos": True, "logprobs": 0,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "temperature": 1.0,
    }  # fmt: skip
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body | {"prompt": prompt}) for prompt in prompts)
        )
    return [
        {"prompt": prompt, "group": group, "choice": choice}
        for group, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for choice in answer.raise_for_status().json()["choices"]
    ]


def iteration(
    served: Served, trainer: Training, stream: Stream, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One rollout and what is learned from it."""
    numbers = random.Random(seed)
    prompts = [[numbers.randrange(10, 2000) for _ in range(options.prompt_tokens)] for _ in range(options.prompts)]
    with Client(trainer.url) as client:
        version = client.status().trainer.weight_version
        begun = time.monotonic()
        completions = asyncio.run(rollout(served, prompts, options))
        sampled = time.monotonic()
        samples = [
            Sample(
                prompt_ids=each["prompt"],
                completion_ids=each["choice"]["token_ids"],
                sampling_logprobs=each["choice"]["logprobs"]["token_logprobs"],
                reward=numbers.random(),
                group=each["group"],
                weight_version=version,
            )
            for each in completions
        ]
        job = client.wait(client.submit(samples, loss="ppo", batch_size=options.batch_size).id, seconds=500)
    trained = time.monotonic()
    body = {"model": "demo", "prompt": prompts[0], "max_tokens": 1}
    httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).raise_for_status()
    answered = time.monotonic()
    steps = trainer.steps(job.id)
    gaps = stream.between(sampled, trained) or [float("nan")]
    return {
        "rollout_seconds": sampled - begun,
        "rollout_tokens_per_second": sum(len(s.completion_ids or ()) for s in samples) / (sampled - begun),
        "train_seconds": trained - sampled,
        "train_tokens_per_second": sum(step["num_tokens"] for step in steps) / (trained - sampled),
        "steps": len(steps),
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "update_seconds": statistics.median(step["optimizer_seconds"] for step in steps),
        "paused_seconds": statistics.median(step["paused_seconds"] for step in steps),
        "first_token_seconds": answered - trained,
        "mismatch_kl": steps[0].get("mismatch_kl"),
        "mismatch_kl_last_step": steps[-1].get("mismatch_kl"),
        "train_p50": 1000 * statistics.median(gaps),
        "train_p99": 1000 * sorted(gaps)[int(0.99 * (len(gaps) - 1))],
    }


def measure(folder: Path, served: Served, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Iterations with this ``sync``; the first one, which warms up, is left out."""
    length = options.prompt_tokens + options.tokens
    overrides = [
        f"sync={mode}", f"cache={'reset' if mode == 'step_lock' else 'none'}", "optim.lr=1e-6", "train.precision=remainder",
        f"train.max_sequence_tokens={length}", f"train.max_micro_batch_tokens={options.micro_batch_tokens}",
        *shlex.split(options.overrides),
    ]  # fmt: skip
    with training(served, folder / mode, tp=options.tp, overrides=overrides) as trainer:
        stream = Stream(served.url, [11, 12, 13], options.tokens)
        try:
            begun = time.monotonic()
            time.sleep(options.idle_seconds)
            idle = 1000 * statistics.median(stream.between(begun, time.monotonic()) or [float("nan")])
            rows = []
            for number in itertools.count():
                row = {"sync": mode, "idle_p50": idle} | iteration(served, trainer, stream, number, options)
                print(row, flush=True)
                if number:
                    rows.append(row)
                if number == options.iterations:
                    return rows
        finally:
            stream.stop()
    raise AssertionError("the loop returns")


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"bench_online: {device_name()}, TP {options.tp}, {options.prompts} x {options.completions} x "
        f"{options.tokens} tokens, {datetime.date.today()}; medians"
    )
    table.add_column("")
    modes = [mode for mode in MODES if any(row["sync"] == mode for row in rows)]
    for mode in modes:
        table.add_column(mode, justify="right")
    for name, title in COLUMNS.items():
        values = [statistics.median(row[name] for row in rows if row["sync"] == mode) for mode in modes]
        table.add_row(title, *(f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in values))
    Console(width=120).print(table)
    write_results(options.out, "online", options.tp, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="a model for any machine, 4 prompts x 4 completions x 16 tokens"
    )
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3, help="that are counted; one more warms up")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--overrides", default="", help="further options of the trainer, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    sizes = (4, 4, 16, 8, 8, 64, 2.0) if options.tiny else (64, 8, 256, 64, 64, 4096, 4.0)
    names = ("prompts", "completions", "tokens", "prompt_tokens", "batch_size", "micro_batch_tokens", "idle_seconds")
    vars(options).update(zip(names, sizes, strict=True))
    extra = ["--logprobs-mode", "processed_logprobs", *shlex.split(options.server_args)]
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="apollo_tp-") as name,
        serving(Path(name), TINY if options.tiny else QWEN3_8B, tp=options.tp, extra=extra) as served,
    ):
        for mode in options.modes:
            rows += measure(Path(name), served, mode, options)
            report(rows, options)  # so far: what follows may fail
    return 0


if __name__ == "__main__":
    sys.exit(main())
