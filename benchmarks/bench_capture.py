"""What storing completions costs a client: inter-token latency and time to first token.

    python benchmarks/bench_capture.py                # a GPU, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_capture.py --tiny         # any machine

One server at TP = 1, and a trainer that trains nothing: without capture, with it (streams of clients that let nothing be
stored, and of those that do, in turn), and without it again, since a machine may become slower meanwhile. Ratios are of
medians over all loads of a case. Streams are those of ``bench_latency.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from bench_latency import generate
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, Served, device_name, serving, training, write_results

from apollo_tp.errors import DeadlineError
from tests.support.processes import ManagedProcess

FIGURES = ("itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms", "output_tokens_per_second")
OFF, QUIET, STORED = "capture.enabled=false", "capture.enabled=true, nothing is stored", "and stored"


def measure(served: Served, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each load."""
    rows: list[dict[str, Any]] = []
    for number, cases in enumerate(
        ((OFF,) * options.rounds, (QUIET, STORED) * options.rounds, (OFF,) * options.rounds)
    ):
        overrides = [f"capture.enabled={str(OFF not in cases).lower()}", "train.max_sequence_tokens=64"]
        with training(served, folder / f"state{number}", tp=1, overrides=overrides) as trainer:
            processes = [served.process, trainer.process]
            extras = {OFF: {}, QUIET: {}, STORED: {"store": True}}
            for case in dict.fromkeys(cases):  # the first request for log-probabilities compiles what computes them
                asyncio.run(warm(served, processes, options, extras[case]))
            for index, case in enumerate(cases):
                seed = 1000 * number + index
                load = asyncio.run(generate(served, processes, options.streams, options, seed, extras[case]))
                rows.append({"case": case} | load.summary())
                print(f"{case}: {load.summary()}", flush=True)
            listed = httpx.get(f"{trainer.url}/v1/chat/completions", timeout=30).json()["data"]
            if bool(listed) != (STORED in cases):
                raise SystemExit(f"got {len(listed)} stored completions in {cases}")
    return rows


async def warm(
    served: Served, processes: list[ManagedProcess], options: argparse.Namespace, extra: dict[str, Any]
) -> None:
    """Loads until one of them has an answer. Raises DeadlineError."""
    deadline = time.monotonic() + options.case_seconds
    while not (await generate(served, processes, options.streams, options, -1, extra)).first:
        if time.monotonic() > deadline:
            raise DeadlineError(f"got no answer in {options.case_seconds:.0f} s, expected one; raise --case-seconds")


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each case, the median of each figure over that without capture."""
    medians = {
        case: {name: statistics.median(row[name] for row in rows if row["case"] == case) for name in FIGURES}
        for case in (OFF, QUIET, STORED)
    }
    return {case: {name: found[name] / medians[OFF][name] for name in FIGURES} for case, found in medians.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, and streams of 32 tokens")
    parser.add_argument("--streams", type=int, help="clients at a time; 2 with --tiny, else 8")
    parser.add_argument("--rounds", type=int, default=4, help="loads of each case")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load that are counted")
    parser.add_argument("--case-seconds", type=float, default=150.0, help="longest wait for a load")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    options.streams = options.streams or (2 if options.tiny else 8)
    options.tokens = 32 if options.tiny else 256
    config = TINY if options.tiny else QWEN3_8B
    options.vocab_size = config["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name, serving(Path(name), config, tp=1) as served:
        rows = measure(served, Path(name), options)
    found = ratios(rows)
    table = Table(title=f"bench_capture: {device_name()}, {datetime.date.today().isoformat()}; ratios")
    for column in ("case", *FIGURES):
        table.add_column(column, no_wrap=column == "case")
    for case, figures in found.items():
        table.add_row(case, *(f"{figures[figure]:.3f}" for figure in FIGURES))
    Console(width=140).print(table)
    write_results(options.out, "capture", 1, {"loads": rows, "ratios": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
