"""Training speed and memory beside a live vLLM server, and of the usual way to train the same model: FSDP2 and AdamW.

    python benchmarks/bench_step.py --out benchmarks/results            # 2 GPUs, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_step.py --tiny                              # rehearsal on any machine
    python benchmarks/bench_step.py --cases 1x fsdp2-1x-compiled        # some rows only

TFLOP/s counts 6 x parameters x tokens (recomputation is not counted as work). Our rows: the server is up and idle during the
steps; a step's sequences are shared by all ranks, one micro-batch each. tokens/s is of a step, from its samples to the end
of the write; what passes between two steps of a job, through the coordinator, stands beside it. Forward, backward and
optimizer are the device's times, sums over ranks included: profile_step.py tells how much those are. FSDP2's rows
(baseline_fsdp2.py) run after the server has ended, on a copy of the weights of their own: each rank takes whole sequences,
at least one, so that at p ranks "1x" is p sequences a step. Peak memory is the allocator's, beyond the weights: served
ones, or a rank's share of the copy.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from server_stack import (
    QWEN3_8B,
    TINY,
    Served,
    Training,
    device_name,
    random_samples,
    serving,
    tflops_per_gpu,
    training,
    write_results,
)

from apollo_tp.errors import ApolloTpError
from tests.support.processes import ManagedProcess

BASELINE_SECONDS = 150
"""A sub-run of the baseline is ended after this long; it starts, compiles and runs in about a third of that."""


@dataclass(frozen=True)
class Case:
    """One row: ``sequences`` of a step, with or without recomputation; the baseline may compile its blocks, and multiply
    in FP8 by torchao (``matmul`` fp8, or fp8-gather, which gathers weights in FP8 too)."""

    sequences: int
    recompute: bool = False
    precision: str = "remainder"
    matmul: str = "served"
    baseline: bool = False
    compiled: bool = False

    def sequences_per_rank(self, ranks: int) -> int:
        """What a rank of the baseline takes: whole sequences, at least one."""
        return max(1, self.sequences // ranks)


CASES = {
    "1x": Case(1),
    "4x": Case(4),
    "1x-stochastic": Case(1, precision="stochastic"),
    "1x-fp8": Case(1, matmul="fp8"),
    "1x-stochastic-fp8": Case(1, precision="stochastic", matmul="fp8"),
    "1x-recompute": Case(1, recompute=True),
    "4x-recompute": Case(4, recompute=True),
    "fsdp2-1x": Case(1, baseline=True),
    "fsdp2-1x-compiled": Case(1, baseline=True, compiled=True),
    "fsdp2-1x-fp8": Case(1, baseline=True, compiled=True, matmul="fp8"),
    "fsdp2-1x-fp8-gather": Case(1, baseline=True, compiled=True, matmul="fp8-gather"),
    "fsdp2-4x-recompute": Case(4, baseline=True, recompute=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, 64 tokens per sequence")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--overrides", default="", help="further options of the trainer, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    options.tokens = 64 if options.tiny else 4096
    results = []
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
        folder = Path(name)
        if trainers := by_trainer(options.cases):
            extra, config = shlex.split(options.server_args), TINY if options.tiny else QWEN3_8B
            with serving(folder, config, tp=options.tp, extra=extra) as served:
                for names in trainers:
                    results += measure(folder / f"state-{names[0]}", served, options, names)
                    report(results, options)  # so far: what follows may fail
        for name in (name for name in options.cases if CASES[name].baseline):
            results.append(baseline(folder, name, options))
            report(results, options)
    return 0


def by_trainer(names: list[str]) -> list[list[str]]:
    """Our cases by the trainer that runs them, the smaller step first: a trainer's peak is that of its life so far."""
    ours = sorted((n for n in names if not CASES[n].baseline), key=lambda n: (*_trainer(n), CASES[n].sequences))
    return [list(group) for _, group in itertools.groupby(ours, key=_trainer)]


def _trainer(name: str) -> tuple[bool, str, str]:
    return CASES[name].recompute, CASES[name].precision, CASES[name].matmul


def measure(state: Path, served: Served, options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """The cases of one trainer, a job each; a trainer that does not start is a row too."""
    overrides = [
        f"train.max_sequence_tokens={options.tokens}", f"train.max_micro_batch_tokens={options.tokens}", "optim.lr=1e-6",
        f"train.gradient_checkpointing={str(CASES[names[0]].recompute).lower()}",
        f"train.precision={CASES[names[0]].precision}", f"train.matmul={CASES[names[0]].matmul}",
        *shlex.split(options.overrides),
    ]  # fmt: skip
    try:
        with training(served, state, tp=options.tp, overrides=overrides) as trainer:
            return [{"case": name} | run_job(trainer, CASES[name], served, options) for name in names]
    except ApolloTpError as error:
        return [{"case": name, "failed": str(error)[:200]} for name in names]


def run_job(trainer: Training, case: Case, served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """The first two steps (compilation, allocation) are not counted. A job that fails (out of memory) is a row too."""
    hello = trainer.status()["trainer"]
    samples = random_samples(case.sequences, options.tokens, hello["vocab_size"])
    body = {"samples": samples, "epochs": options.steps, "batch_size": case.sequences, "wait": True}
    job = trainer.submit(body)
    if job["state"] != "succeeded":
        return {"failed": str(job["error"])[:200]}
    steps = trainer.steps(job["id"])[2:]
    seconds = statistics.median(step["step_seconds"] for step in steps)
    intervals = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(steps)]
    num_tokens = options.tokens * case.sequences
    return {
        "sequences": case.sequences,
        "recompute": case.recompute,
        "matmul": case.matmul,
        "tokens_per_step": num_tokens,
        "tokens_per_rank": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "tflops_per_gpu": tflops_per_gpu(hello["num_parameters"], num_tokens, seconds, options.tp),
        "step_seconds": seconds,
        "seconds_between_steps": statistics.median(intervals) - seconds if intervals else None,
        "num_parameters": hello["num_parameters"],
        "weights_gb": [n / 1e9 for n in served.weight_bytes()],
        "beyond_weights_gb": [n / 1e9 for n in steps[-1].get("peak_memory_bytes") or [] if n],
        "seconds": {k: statistics.median(s.get(k, 0.0) for s in steps) for k in
                    ("forward_seconds", "backward_seconds", "optimizer_seconds")},
        "skipped": sum(bool(step.get("skipped")) for step in steps),
        "gradients": steps[-1].get("gradients"),
        "optimizer": hello["optimizer"],
    }  # fmt: skip


def baseline(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the baseline; one that fails or takes too long says so in "failed"."""
    case = CASES[name]
    switches = {"--tiny": options.tiny, "--compile": case.compiled, "--recompute": case.recompute}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.tp),
        str(Path(__file__).with_name("baseline_fsdp2.py")), "--sequences", str(case.sequences_per_rank(options.tp)),
        "--tokens", str(options.tokens), "--steps", str(options.steps), "--matmul", case.matmul,
        *(s for s, on in switches.items() if on),
    ]  # fmt: skip
    row = {
        "case": name,
        "sequences": case.sequences,
        "recompute": case.recompute,
        "compiled": case.compiled,
        "matmul": case.matmul,
    }
    process = ManagedProcess(command, {}, folder / f"{name}.log")
    try:
        status = process.process.wait(BASELINE_SECONDS)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"no result after {BASELINE_SECONDS} s"}
    finally:
        process.stop()
    if status:
        print(process.tail(), file=sys.stderr)
        return row | {"failed": failure(process.log.read_text(errors="replace"))}
    result = json.loads(next(line for line in reversed(process.tail().splitlines()) if line.startswith("{")))
    peaks = zip(result["peak_memory_gb"], result["weights_gb"], strict=False)
    return row | result | {"beyond_weights_gb": [peak - weights for peak, weights in peaks]}


def failure(output: str) -> str:
    """The error of a failed sub-run in one line: running out of memory, else the first exception of its output."""
    lines = [line.partition("]:")[2].strip() or line.strip() for line in output.splitlines() if "Error" in line]
    memory = [line for line in lines if "OutOfMemoryError" in line]
    return (memory or lines or ["no result"])[0][:200]


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"bench_step: {options.tp} x {device_name()}, {options.tokens:,} tokens a sequence, {datetime.date.today()}"
    )
    for column in (
        "case",
        "tokens a step",
        "of a rank",
        "tokens/s",
        "TFLOP/s per GPU",
        "step s",
        "forward + backward + optimizer, ms",
        "between, ms",
        "weights GB",
        "peak GB beyond",
    ):
        table.add_column(column)
    for r in results:
        if "failed" in r:
            table.add_row(r["case"], r["failed"])
            continue
        weights, beyond = (", ".join(f"{gb:.1f}" for gb in r[key]) for key in ("weights_gb", "beyond_weights_gb"))
        between = r.get("seconds_between_steps")
        between = f"{between * 1e3:.0f}" if between else "-"
        phases = " + ".join(f"{1e3 * t:.0f}" for t in r.get("seconds", {}).values()) or "-"
        table.add_row(
            r["case"], f"{r['tokens_per_step']:,}", f"{r['tokens_per_rank']:,}", f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops_per_gpu']:.1f}", f"{r['step_seconds']:.3f}", phases, between, weights, beyond,
        )  # fmt: skip
    Console(width=160).print(table)
    write_results(options.out, "step", options.tp, results)


if __name__ == "__main__":
    sys.exit(main())
