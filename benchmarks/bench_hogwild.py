"""Updates without a pause: does a request ever see a broken number, and do the weights end where paused updates end?

    python benchmarks/bench_hogwild.py --tp 1 --out benchmarks/results        # a GPU, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_hogwild.py --tp 1 --tiny                          # rehearsal on any machine

At each learning rate (the second goes on where the first ended), streams generate ``--tokens`` tokens while steps run with
``sync=hogwild``, under vLLM's default mode (CUDA graphs on a GPU): log-probabilities that are not finite are counted, and
must be none. Then fixed prompts are decoded greedily, one at a time. The initial weights are put back through the mapping,
the same steps run with ``sync=drain``, and the same prompts are decoded: equal tokens, and log-probabilities up to where
tokens part. That is done twice: gradients on a GPU are not the same to the last bit from one run to the next, and the
difference to a run without pauses must be read against that of two runs with pauses.

vLLM's dummy weights, norms included, are uniform within 1e-3: every token would have the same probability, whatever is
trained. So matrices with a deviation of 0.02 and norms of one are written over them first. Such a model is still surer of
nothing than a trained one, and its arg max is easily turned. Controls: two decodings of the initial weights say how much two
runs of vLLM differ; one after the weights are back, that they are; a comparison with the initial weights, that training
changed the answers at all. Last, a NaN is written into the final norm: the counter must see it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import math
import random
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, Served, Training, device_name, random_samples, serving, training, write_results
from torch import Tensor

from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import map_rank

LEARNING_RATES = (1e-5, 1e-4)
CLAMPED = -9999.0
"""What vLLM's API makes of minus infinity."""


class ServedWeights:
    """The served memory of all ranks, mapped into this process beside the trainer's own mapping."""

    def __init__(self, folder: Path) -> None:
        manifests = read_instance(folder)
        self._ranks = [map_rank(manifests, rank) for rank in range(len(manifests))]
        self.tensors: dict[str, Tensor] = {
            f"{name} {rank}": local
            for rank, mapped in enumerate(self._ranks)
            for name, (_, local) in mapped.tensors.items()
        }

    def randomise(self) -> None:
        """Weights of the usual size, the same at every start; replicas are equal."""
        for rank, mapped in enumerate(self._ranks):
            for name, (shard, local) in mapped.tensors.items():
                part = "whole" if shard.dim is None else rank
                draw = torch.Generator(local.device).manual_seed(zlib.crc32(f"{name} {part}".encode()))
                local.fill_(1.0) if local.ndim == 1 else local.normal_(0.0, 0.02, generator=draw)
        self._finish()

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors.items()}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Write ``saved`` into the served memory; nothing must run."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])
        self._finish()

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Zeros in the place of one parameter, on all ranks; nothing must run."""
        parts = {key: tensor for key, tensor in self.tensors.items() if key.rsplit(" ", 1)[0] == name}
        assert parts, name
        saved = {key: tensor.clone() for key, tensor in parts.items()}
        for tensor in parts.values():
            tensor.zero_()
        self._finish()
        try:
            yield
        finally:
            for key, tensor in parts.items():
                tensor.copy_(saved[key])
            self._finish()

    def _finish(self) -> None:
        for mapped in self._ranks:
            if mapped.device.type == "cuda":
                torch.cuda.synchronize(mapped.device)

    def fingerprint(self) -> dict[str, int]:
        """Per tensor the sum of its bits as integers: equal tensors have equal ones, others hardly ever."""
        integer = {2: torch.int16, 4: torch.int32}
        return {
            name: int(tensor.view(integer[tensor.itemsize]).sum(dtype=torch.int64))
            for name, tensor in self.tensors.items()
        }


@dataclass(frozen=True)
class Answer:
    """Tokens and log-probabilities (nats) of one completion; a request that failed has NaN for each token it asked for."""

    token_ids: list[int]
    logprobs: list[float]
    error: str = ""

    @property
    def num_bad(self) -> int:
        return sum(not math.isfinite(value) or value <= CLAMPED for value in self.logprobs)


def body(prompt: list[int], tokens: int, temperature: float) -> dict[str, Any]:
    return {
        "model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": temperature,
        "logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True,
    }  # fmt: skip


def answer(response: httpx.Response, tokens: int) -> Answer:
    """Of a response. vLLM cannot put NaN into JSON: it answers 500, or null."""
    if response.status_code != 200:
        return Answer([], [math.nan] * tokens, response.text[:300])
    choice = response.json()["choices"][0]
    return Answer(choice["token_ids"], [math.nan if v is None else v for v in choice["logprobs"]["token_logprobs"]])


def decode(served: Served, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """Greedy and one after the other: the same batch of one each time, so that no sum depends on what else runs."""
    with httpx.Client(timeout=120) as http:
        url = f"{served.url}/v1/completions"
        return [answer(http.post(url, json=body(prompt, tokens, 0.0)), tokens) for prompt in prompts]


async def generate(
    served: Served, trainer: Training, job_id: str, options: argparse.Namespace, seed: int
) -> list[Answer]:
    """Answers to random prompts, some at a time, until they hold ``--tokens`` tokens; the job must run throughout."""
    answers: list[Answer] = []

    async def stream(http: httpx.AsyncClient, draw: random.Random) -> None:
        while True:
            prompt = [draw.randrange(options.vocab_size) for _ in range(16)]
            response = await http.post(
                f"{served.url}/v1/completions", json=body(prompt, options.answer_tokens, temperature=1.0)
            )
            answers.append(answer(response, options.answer_tokens))

    limits = httpx.Limits(max_connections=options.streams)
    async with (
        asyncio.timeout(options.load_seconds),
        httpx.AsyncClient(timeout=options.load_seconds, limits=limits) as http,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(stream(http, random.Random(f"{seed} {i}"))) for i in range(options.streams)]
        while sum(len(a.logprobs) for a in answers) < options.tokens:
            await asyncio.sleep(0.2)
            served.process.check()
            trainer.process.check()
            state = (await http.get(f"{trainer.url}/train/jobs/{job_id}")).json()
            assert state["state"] == "running", state
        for task in tasks:
            task.cancel()
    return answers


def job_body(options: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """The same for both kinds of update, but for ``max_steps`` and ``wait``."""
    samples = random_samples(8, options.step_tokens, options.vocab_size, seed)
    return {
        "samples": samples, "epochs": 10_000, "batch_size": 1, "learning_rate_scale": rate / LEARNING_RATES[0],
    }  # fmt: skip


def unpaused(served: Served, trainer: Training, options: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """Train and generate at once; the job ends when enough is generated. ``steps`` says how far it came."""
    url = f"{trainer.url}/train/jobs/{trainer.submit(job_body(options, rate, seed))['id']}"
    _wait(trainer, url, lambda job: job["step"] >= 1, options.load_seconds)
    begun = time.monotonic()
    answers = asyncio.run(generate(served, trainer, url.rsplit("/", 1)[1], options, seed))
    seconds = time.monotonic() - begun
    httpx.post(f"{url}/cancel", timeout=30).raise_for_status()
    job = _wait(trainer, url, lambda job: job["state"] not in ("running", "queued"), options.load_seconds)
    return {
        "learning_rate": rate, "steps": job["step"], "seconds": seconds,
        "tokens": sum(len(a.logprobs) for a in answers), "not_finite": sum(a.num_bad for a in answers),
        "failed_requests": sum(bool(a.error) for a in answers),
        "first_error": next((a.error for a in answers if a.error), ""),
    }  # fmt: skip


def _wait(trainer: Training, url: str, condition: Any, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not condition(job := httpx.get(url, timeout=30).json()):
        trainer.process.check()
        assert time.monotonic() < deadline, job
        assert job["state"] != "failed", job
        time.sleep(0.1)
    return job


def compare(found: list[Answer], expected: list[Answer]) -> dict[str, Any]:
    """Greedy tokens up to where each pair parts; ``first_divergence`` is the earliest position, null if there is none."""
    common = []
    for a, b in zip(found, expected, strict=True):
        pairs = enumerate(zip(a.token_ids, b.token_ids, strict=False))
        common.append(next((i for i, (x, y) in pairs if x != y), min(len(a.token_ids), len(b.token_ids))))
    total = sum(len(b.logprobs) for b in expected)
    gaps = [
        abs(x - y)
        for a, b, n in zip(found, expected, common, strict=True)
        for x, y in zip(a.logprobs[:n], b.logprobs[:n], strict=True)
    ]
    parted = [n for n, b in zip(common, expected, strict=True) if n < len(b.logprobs)]
    return {
        "equal_tokens": sum(common) / total,
        "first_divergence": min(parted, default=None),
        "max_logprob_gap": max(gaps, default=math.nan),
    }


def mean_logprob(answers: list[Answer]) -> float:
    values = [value for a in answers for value in a.logprobs]
    return sum(values) / len(values)


def run(served: Served, folder: Path, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fills ``results`` as it goes, so that what is known survives what fails."""
    draw = random.Random(1)
    prompts = [[draw.randrange(options.vocab_size) for _ in range(16)] for _ in range(options.prompts)]

    def fixed() -> list[Answer]:
        return decode(served, prompts, options.prompt_tokens)

    weights = ServedWeights(served.runtime_dir / "demo")
    weights.randomise()
    saved, first = weights.copy(), fixed()
    start = weights.fingerprint()
    results["same weights twice"] = compare(fixed(), first)
    results["initial mean log-probability"] = mean_logprob(first)
    size = options.step_tokens
    overrides = [
        f"train.max_sequence_tokens={size}", f"train.max_micro_batch_tokens={size}", "checkpoint.resume=false",
        f"optim.lr={LEARNING_RATES[0]}",
    ]  # fmt: skip
    after = []
    with training(served, folder / "hogwild", tp=options.tp, overrides=[*overrides, "sync=hogwild"]) as trainer:
        for seed, rate in enumerate(LEARNING_RATES):
            row = unpaused(served, trainer, options, rate, seed)
            results["rates"].append(row)
            after.append((fixed(), weights.fingerprint()))
            print(
                f"hogwild, lr {rate:g}: {row['tokens']} tokens, {row['steps']} steps, {row['seconds']:.0f} s",
                flush=True,
            )

    def paused(state: str) -> list[tuple[list[Answer], dict[str, int], float]]:
        """Answers, weights and seconds of pause after the same steps, from the same weights, with a pause for each."""
        weights.restore(saved)
        results["weights restored"] = compare(fixed(), first) | {"bits": share_equal(weights.fingerprint(), start)}
        found = []
        with training(served, folder / state, tp=options.tp, overrides=[*overrides, "sync=drain"]) as trainer:
            for seed, (rate, row) in enumerate(zip(LEARNING_RATES, results["rates"], strict=True)):
                job = trainer.submit(job_body(options, rate, seed) | {"max_steps": row["steps"], "wait": True})
                assert job["state"] == "succeeded", job["error"]
                seconds = sum(step.get("paused_seconds") or 0.0 for step in trainer.steps(job["id"]))
                found.append((fixed(), weights.fingerprint(), seconds))
        return found

    once, again = paused("drain"), paused("drain-again")
    for row, hogwild, (answers, bits, seconds), other in zip(results["rates"], after, once, again, strict=True):
        row |= compare(hogwild[0], answers) | {"weights_bit_equal": share_equal(hogwild[1], bits)}
        row |= {f"paused_twice_{key}": value for key, value in compare(other[0], answers).items()}
        row |= {
            "paused_twice_weights_bit_equal": share_equal(other[1], bits),
            "weights_as_at_start": share_equal(hogwild[1], start),
            "tokens_as_at_start": compare(hogwild[0], first)["equal_tokens"], "mean_logprob": mean_logprob(hogwild[0]),
            "paused_twice_mean_logprob": mean_logprob(other[0]), "paused_mean_logprob": mean_logprob(answers),
            "paused_seconds": seconds,
        }  # fmt: skip
    norm = next(tensor for name, tensor in weights.tensors.items() if name.startswith("model.norm.weight"))
    norm.fill_(math.nan)
    results["NaN control: bad of 4 tokens"] = decode(served, prompts[:1], 4)[0].num_bad


def share_equal(found: dict[str, int], expected: dict[str, int]) -> float:
    """Share of tensors with the same bits."""
    return sum(found[name] == value for name, value in expected.items()) / len(expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, a few hundred tokens")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="generated at each learning rate (default 100,000; tiny 300)")
    parser.add_argument("--load-seconds", type=float, default=150.0, help="longest time that this may take")
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    tiny = options.tiny
    options.tokens = options.tokens or (300 if tiny else 100_000)
    options.streams, options.answer_tokens, options.step_tokens = (4, 16, 64) if tiny else (64, 512, 2048)
    options.prompts, options.prompt_tokens = (3, 12) if tiny else (8, 64)
    options.vocab_size = (TINY if tiny else QWEN3_8B)["vocab_size"]
    results: dict[str, Any] = {"rates": []}
    try:
        with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
            extra, config = shlex.split(options.server_args), TINY if tiny else QWEN3_8B
            with serving(Path(name), config, tp=options.tp, extra=extra) as served:
                run(served, Path(name), options, results)
    finally:
        report(results, options)
    return int(any(row["not_finite"] for row in results["rates"]) or not results["NaN control: bad of 4 tokens"])


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    """One column per learning rate, then the controls."""
    rows = results["rates"]
    table = Table(title=f"bench_hogwild: TP = {options.tp}, {device_name()}, {datetime.date.today().isoformat()}")
    table.add_column("what")
    for row in rows:
        table.add_column(f"lr {row['learning_rate']:g}", justify="right")
    for key in rows[-1] if rows else ():
        table.add_row(key, *(_shown(row.get(key)) for row in rows))
    Console(width=120).print(table)
    for key, value in results.items():
        if key != "rates":
            print(f"{key}: {value}")
    write_results(options.out, "hogwild", options.tp, results)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
