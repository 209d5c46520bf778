"""Training speed and memory beside a live vLLM server: tokens/s, TFLOP/s per GPU, peak memory beyond the served weights.

    python benchmarks/bench_step.py --out benchmarks/results            # 2 GPUs, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_step.py --tiny                              # rehearsal on any machine

TFLOP/s counts 6 x parameters x tokens (recomputation is not counted as work). The server is up and idle during the steps.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stack import QWEN3_8B, TINY, Served, device_name, random_samples, serving, training, write_results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, 64 tokens per sequence")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--overrides", default="", help="further options of the trainer, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    tokens = 64 if options.tiny else 4096
    cases = [
        {"sequences": 1, "recompute": False},
        {"sequences": 4, "recompute": False},
        {"sequences": 4, "recompute": True},
    ]
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
        folder = Path(name)
        config = TINY if options.tiny else QWEN3_8B
        with serving(folder, config, tp=options.tp, extra=shlex.split(options.server_args)) as served:
            results = [measure(folder, served, options, case, tokens) for case in cases]
    report(results, options, tokens)
    return 0


def measure(folder: Path, served: Served, options: argparse.Namespace, case: dict, tokens: int) -> dict[str, Any]:
    """One trainer per case; the first two steps (compilation, allocation) are not counted."""
    overrides = [
        f"train.max_sequence_tokens={tokens}", f"train.max_micro_batch_tokens={tokens}", "optim.lr=1e-6",
        f"train.gradient_checkpointing={str(case['recompute']).lower()}", *shlex.split(options.overrides),
    ]  # fmt: skip
    state = folder / f"state-{case['sequences']}-{case['recompute']}"
    with training(served, state, tp=options.tp, overrides=overrides) as trainer:
        hello = trainer.status()["trainer"]
        samples = random_samples(case["sequences"], tokens, hello["vocab_size"])
        body = {"samples": samples, "epochs": options.steps, "batch_size": case["sequences"], "wait": True}
        job = trainer.submit(body)
        assert job["state"] == "succeeded", job["error"]
        steps, status = trainer.steps(job["id"])[2:], trainer.status()
    seconds = statistics.median(step["step_seconds"] for step in steps)
    num_tokens = tokens * case["sequences"]
    return case | {
        "tokens_per_step": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "tflops_per_gpu": 6 * hello["num_parameters"] * num_tokens / seconds / options.tp / 1e12,
        "step_seconds": seconds,
        "num_parameters": hello["num_parameters"],
        "peak_memory_gb": [n / 1e9 for n in (steps[-1].get("peak_memory_bytes") or status.get("peak_memory_bytes") or [])],
        "seconds": {k: statistics.median(s.get(k, 0.0) for s in steps) for k in
                    ("forward_seconds", "backward_seconds", "optimizer_seconds")},
        "skipped": sum(bool(step.get("skipped")) for step in steps),
        "gradients": steps[-1].get("gradients"),
        "optimizer": hello["optimizer"],
    }  # fmt: skip


def report(results: list[dict], options: argparse.Namespace, tokens: int) -> None:
    table = Table(
        title=f"bench_step: TP = {options.tp}, {options.tp} x {device_name()}, {datetime.date.today().isoformat()}"
    )
    for column in ("batch", "recompute", "gradients", "tokens/s", "TFLOP/s per GPU", "step s", "peak GB"):
        table.add_column(column)
    for r in results:
        memory = ", ".join(f"{gb:.1f}" for gb in r["peak_memory_gb"])
        table.add_row(
            f"{r['sequences']} x {tokens}", str(r["recompute"]), str(r["gradients"]), f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops_per_gpu']:.1f}", f"{r['step_seconds']:.3f}", memory,
        )  # fmt: skip
    Console(width=120).print(table)
    write_results(options.out, "step", options.tp, results)


if __name__ == "__main__":
    sys.exit(main())
