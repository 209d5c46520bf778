"""What training costs a client, and what a quiet client costs training: inter-token latency, time to first token, tokens/s.

    python benchmarks/bench_latency.py --tp 1 --out benchmarks/results        # a GPU, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_latency.py --tp 1 --tiny                          # rehearsal on any machine

Streams of 256 tokens in and 256 out, greedy, one request after the other, against vLLM: alone, and while steps of 4,096
tokens run under each quality of service (``conf/qos``). The cases under MPS have a server, and an MPS daemon, of their own.

ITL is the time between two chunks of a stream; vLLM puts tokens that wait for the client into one chunk, so that tokens per
chunk above 1.0 mean a client or API server at its limit. TTFT is from the request to its first chunk. Clients read bare
sockets: an HTTP library takes several times as long for each chunk. Training speed is from the end of one step to another's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from server_stack import (
    QWEN3_8B,
    TINY,
    Served,
    Training,
    device_name,
    mps_daemon,
    random_samples,
    serving,
    training,
    write_results,
)  # fmt: skip

from apollo_tp.errors import DeadlineError, DeviceError, ServerGoneError
from tests.support.processes import ManagedProcess

WARM_UP_STEPS, STEPS_ALONE = 2, 4
SETTLE_SECONDS = 1.0
"""Of a load before it counts: all its streams begin at once, which no traffic does."""


@dataclass(frozen=True)
class Case:
    """``overrides`` of the trainer; None does not train."""

    mps: bool
    overrides: tuple[str, ...] | None


CASES = {
    "idle": Case(False, None),
    "time-slicing": Case(False, ("qos=off",)),
    "pace 0.5": Case(False, ("qos=paced",)),
    "MPS idle": Case(True, None),
    "MPS": Case(True, ("qos=off",)),
    "MPS low": Case(True, ("qos=off", "qos.low_priority=true")),
}
"""By name. ``low``: inference's kernels go first. An ``MPS idle`` server tells what MPS alone costs."""
DEFAULT = [*CASES, *(f"MPS {share} % low" for share in (75, 50, 25)), "MPS 50 %"]


def case_of(name: str) -> Case | None:
    """One of CASES, or "MPS N %", "MPS N % low": ``qos=shared`` and ``gentle`` are 75 and 25 % low."""
    if share := re.fullmatch(r"MPS (\d+) %( low)?", name):
        low = str(share[2] is not None).lower()
        return Case(True, ("qos=off", f"qos.sm_percent={share[1]}", f"qos.low_priority={low}"))
    return CASES.get(name)


@dataclass
class Load:
    """What the clients saw between ``begin`` and ``end`` (time.monotonic)."""

    begin: float
    end: float
    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0

    def chunk(self, since: float, tokens: int, *, is_first: bool) -> float:
        """Count a chunk that has just come; returns when that was."""
        now = time.monotonic()
        if self.begin <= now < self.end:
            (self.first if is_first else self.gaps).append(now - since)
            self.tokens += tokens
        return now

    def summary(self) -> dict[str, float]:
        return {
            "itl_p50_ms": 1e3 * percentile(self.gaps, 50), "itl_p99_ms": 1e3 * percentile(self.gaps, 99),
            "ttft_p50_ms": 1e3 * percentile(self.first, 50), "ttft_p99_ms": 1e3 * percentile(self.first, 99),
            "output_tokens_per_second": self.tokens / (self.end - self.begin),
            "chunks": len(self.gaps) + len(self.first), "requests": len(self.first),
            "tokens_per_chunk": self.tokens / max(len(self.gaps) + len(self.first), 1),
        }  # fmt: skip


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that ``q`` percent do not exceed; NaN of none."""
    return sorted(values)[max(math.ceil(len(values) * q / 100) - 1, 0)] if values else math.nan


async def client(
    served: Served, load: Load, vocab_size: int, tokens: int, draw: random.Random, extra: dict[str, Any]
) -> None:
    """One request after the other until cancelled, each with a prompt that no other has: the prefix cache must not help.
    ``extra`` are further fields of each."""
    host, port = served.url.removeprefix("http://").split(":")
    while True:
        prompt = [draw.randrange(vocab_size) for _ in range(tokens)]
        request = {
            "model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "return_token_ids": True, **extra,
        }  # fmt: skip
        body = json.dumps(request).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            last, is_first = time.monotonic(), True
            status = await reader.readline()
            assert b" 200 " in status, status + await reader.read(2000)
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "choices" in chunk, chunk
                    count = len(chunk["choices"][0].get("token_ids") or ())
                    last, is_first = load.chunk(last, count, is_first=is_first), False
        finally:
            writer.close()  # vLLM drops the request if it is not over


async def generate(
    served: Served,
    processes: list[ManagedProcess],
    streams: int,
    options: argparse.Namespace,
    seed: int,
    extra: dict[str, Any] | None = None,
) -> Load:
    """Run ``streams`` clients for ``--seconds``. Raises as soon as one of ``processes`` ends."""
    begin = time.monotonic() + SETTLE_SECONDS
    load = Load(begin, begin + options.seconds)
    async with asyncio.timeout(options.case_seconds), asyncio.TaskGroup() as group:
        clients = [
            group.create_task(
                client(
                    served,
                    load,
                    options.vocab_size,
                    options.tokens,
                    random.Random(f"{seed} {streams} {i}"),
                    extra or {},
                )
            )
            for i in range(streams)
        ]
        while time.monotonic() < load.end:
            await asyncio.sleep(0.25)
            for process in processes:
                process.check()
        for task in clients:
            task.cancel()
    return load


def training_speed(steps: list[dict[str, Any]]) -> float:
    """Tokens per second between the end of the first and of the last of ``steps``; NaN of fewer than two."""
    if len(steps) < 2:
        return math.nan
    return sum(step["num_tokens"] for step in steps[1:]) / (steps[-1]["time"] - steps[0]["time"])


class Job:
    """A job of short steps without an end, beside whatever else is done; ``processes`` must live."""

    def __init__(self, trainer: Training, processes: list[ManagedProcess], options: argparse.Namespace) -> None:
        self._trainer, self._processes = trainer, processes
        vocab_size = trainer.status()["trainer"]["vocab_size"]
        samples = random_samples(8, options.step_tokens, vocab_size)
        self.id = trainer.submit({"samples": samples, "epochs": 10_000, "batch_size": 1})["id"]

    def steps(self) -> list[dict[str, Any]]:
        """Metrics of each completed step, with the ``time`` (Unix, seconds) at which it was reported."""
        url = f"{self._trainer.url}/train/jobs/{self.id}/events?limit=10000"
        events = httpx.get(url, timeout=30).json()["data"]
        return [event["data"] | {"time": event["time"]} for event in events if event["type"] == "metrics"]

    def wait(self, count: int, seconds: float) -> list[dict[str, Any]]:
        """Until ``count`` steps are over; returns them all."""
        deadline = time.monotonic() + seconds
        while len(steps := self.steps()) < count:
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"got {len(steps)} steps in {seconds:.0f} s, expected {count}; raise --case-seconds"
                )
            for process in self._processes:
                process.check()
            time.sleep(0.1)
        return steps

    def cancel(self, seconds: float) -> None:
        """Until no step runs: an MPS client that is stopped amid its kernels may take the daemon's other clients along."""
        url, deadline = f"{self._trainer.url}/train/jobs/{self.id}", time.monotonic() + seconds
        httpx.post(f"{url}/cancel", timeout=30).raise_for_status()
        while (state := httpx.get(url, timeout=30).json()["state"]) == "running":
            if time.monotonic() > deadline:
                raise DeadlineError(f"job {self.id}: got state {state} {seconds:.0f} s after it was cancelled")
            time.sleep(0.1)


def measure(served: Served, folder: Path, name: str, environment: dict[str, str], options: argparse.Namespace) -> list:
    """One row per number of streams; one alone if the GPU multiplies wrong in this case, so that the trainer refuses."""
    try:
        return loads(served, folder, name, environment, options)
    except ServerGoneError:
        log = folder / f"state{options.cases.index(name)}" / "trainer.log"
        refusals = (
            [line for line in log.read_text().splitlines() if DeviceError.__name__ in line] if log.exists() else []
        )
        if not refusals:
            raise
        return [{"case": name, "refused": refusals[0]}]


def loads(served: Served, folder: Path, name: str, environment: dict[str, str], options: argparse.Namespace) -> list:
    case, seed = case_of(name), options.cases.index(name)
    if case.overrides is None:
        seen = [(n, asyncio.run(generate(served, [served.process], n, options, seed))) for n in options.streams]
        return [{"case": name, "streams": n} | load.summary() for n, load in seen]
    size = options.step_tokens
    overrides = [
        f"train.max_sequence_tokens={size}",
        f"train.max_micro_batch_tokens={size}",
        "optim.lr=1e-6",
        "train.precision=remainder",
    ]
    rows: list[dict[str, Any]] = []
    with training(
        served, folder / f"state{seed}", tp=options.tp, overrides=[*overrides, *case.overrides],
        environment=environment, seconds=options.case_seconds,
    ) as trainer:  # fmt: skip
        processes = [served.process, trainer.process]
        job = Job(trainer, processes, options)
        alone = training_speed(job.wait(WARM_UP_STEPS + STEPS_ALONE, options.case_seconds)[WARM_UP_STEPS - 1 :])
        for streams in options.streams:
            begun = time.time()
            load = asyncio.run(generate(served, processes, streams, options, seed))
            steps = [step for step in job.steps() if step["time"] > begun + SETTLE_SECONDS]
            rows.append(
                {"case": name, "streams": streams, "qos": trainer.status()["trainer"]["qos"]}
                | load.summary()
                | {"training_tokens_per_second": training_speed(steps), "training_alone": alone, "steps": len(steps)}
            )
        job.cancel(options.case_seconds)
    return rows


def run(folder: Path, options: argparse.Namespace) -> Iterator[list]:
    """The rows of each case, as they come."""
    for mps in (False, True):
        names = [name for name in options.cases if case_of(name).mps == mps]
        if mps and names and not shutil.which("nvidia-cuda-mps-control"):
            print(f"skipped: {', '.join(names)}: no nvidia-cuda-mps-control on PATH (a CPU has no SMs to share)")
            continue
        if not names:
            continue
        place = folder / ("mps" if mps else "plain")
        place.mkdir()
        config = TINY if options.tiny else QWEN3_8B
        with contextlib.ExitStack() as stack:
            environment = stack.enter_context(mps_daemon(place)) if mps else {}
            extra = shlex.split(options.server_args)
            served = stack.enter_context(
                serving(
                    place, config, tp=options.tp, extra=extra, environment=environment, seconds=options.server_seconds
                )
            )
            print(f"server: up after {time.monotonic() - options.begun:.0f} s, MPS {mps}", flush=True)
            for name in names:
                rows = measure(served, place, name, environment, options)
                print(f"{name}: after {time.monotonic() - options.begun:.0f} s, {rows[0].get('qos', '')}", flush=True)
                yield rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, 2 and 4 streams of 32 tokens")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--cases", default=",".join(DEFAULT), help="separated by commas; MPS N %% [low] with any N")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load that are counted")
    parser.add_argument("--case-seconds", type=float, default=150.0, help="longest wait for the trainer, or for a step")
    parser.add_argument("--server-seconds", type=float, default=240.0, help="longest wait for a server")
    parser.add_argument("--server-args", default="", help="further options of the vLLM servers, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    if unknown := [name for name in options.cases if case_of(name) is None]:
        parser.error(f"--cases: got {', '.join(unknown)}, expected {', '.join(DEFAULT)}, or another share")
    options.begun = time.monotonic()
    options.streams, options.tokens, options.step_tokens = ((2, 4), 32, 64) if options.tiny else ((8, 32), 256, 4096)
    options.vocab_size = (TINY if options.tiny else QWEN3_8B)["vocab_size"]
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
            for found in run(Path(name), options):
                rows += found
                write_results(
                    options.out, "latency", options.tp, rows
                )  # a case that fails does not take the others along
    finally:
        report(rows, options)
    return 0


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table. Training speed is also given as a share of what an unlimited trainer reaches beside an idle server."""
    unlimited = [row["training_alone"] for row in rows if row["case"] in ("time-slicing", "MPS") and "streams" in row]
    table = Table(title=f"bench_latency: TP = {options.tp}, {device_name()}, {datetime.date.today().isoformat()}")
    for column in (
        "case", "streams", "ITL p50 ms", "ITL p99 ms", "TTFT p50 ms", "TTFT p99 ms", "out tokens/s", "tokens/chunk",
        "training tokens/s", "idle server", "share",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=column == "case")
    for row in rows:
        if "refused" in row:
            print(f"{row['case']}: {row['refused']}")
            continue
        cells = [f"{row[f'{what}_{p}_ms']:.1f}" for what in ("itl", "ttft") for p in ("p50", "p99")]
        cells += [f"{row['output_tokens_per_second']:,.0f}", f"{row['tokens_per_chunk']:.2f}"]
        if "training_alone" in row:
            speed = row["training_tokens_per_second"]
            cells += [f"{speed:,.0f}", f"{row['training_alone']:,.0f}"]
            cells += [f"{speed / unlimited[0]:.2f}"] if unlimited else []
        table.add_row(row["case"], str(row["streams"]), *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
