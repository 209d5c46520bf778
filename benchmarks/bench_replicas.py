"""Speed and memory of replicas that are trained together, beside their live servers; of TP and FSDP2 over the same GPUs.

    python benchmarks/bench_replicas.py --out benchmarks/results        # 2 GPUs, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_replicas.py --tiny                          # rehearsal on any machine

``alone-1x`` is one server and its trainer at TP = 1: the step without any exchange, so that what a step of ``replicas-1x``,
with the same tokens on each GPU, takes longer is the exposed part of it. FSDP2 is data parallel over the same GPUs, with
whole sequences on each. Figures and columns as in bench_step.py; state is the optimizer's with remainders, on rank 0.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_step import Case, baseline, run_job
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, device_name, serving, serving_replicas, training, write_results

from apollo_tp.errors import ApolloTpError

FSDP2 = "fsdp2-1x-compiled"


@dataclass(frozen=True)
class Shape:
    """``replicas`` servers at tensor-parallel size ``tp``, and ``sequences`` on each of them in a step."""

    replicas: int
    tp: int
    sequences: int = 1


SHAPES = {
    "replicas-1x": Shape(2, 1), "replicas-4x": Shape(2, 1, 4), "alone-1x": Shape(1, 1), "tp-1x": Shape(1, 2),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, 64 tokens per sequence")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=[*SHAPES, FSDP2], default=[*SHAPES, FSDP2], help="default: all")
    parser.add_argument("--server-args", default="", help="further options of the vLLM servers, in one string")
    parser.add_argument("--overrides", default="", help="further options of the trainer, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    options.tokens = 64 if options.tiny else 4096
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
        for servers in (2, 1):
            wanted = [case for case in options.cases if case in SHAPES and SHAPES[case].replicas == servers]
            for tp in sorted({SHAPES[case].tp for case in wanted}):
                folder = Path(name) / f"{servers}x{tp}"
                folder.mkdir()
                cases = [case for case in wanted if SHAPES[case].tp == tp]
                results += measure(folder, cases, SHAPES[cases[0]], options)
                report(results, options)  # so far: what follows may fail
        if FSDP2 in options.cases:
            options.tp = 2
            results.append(baseline(Path(name), FSDP2, options))
            report(results, options)
    return int(any("failed" in row for row in results))


def measure(folder: Path, cases: list[str], shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cases of one shape of servers, a job each; a trainer that does not start is a row too."""
    config, extra = TINY if options.tiny else QWEN3_8B, shlex.split(options.server_args)
    options.tp = shape.replicas * shape.tp  # the GPUs over which run_job divides the work
    overrides = [
        f"train.max_sequence_tokens={options.tokens}", f"train.max_micro_batch_tokens={options.tokens}",
        "optim.lr=1e-6", "train.precision=remainder",
        *([f"server.replicas={shape.replicas}"] if shape.replicas > 1 else []), *shlex.split(options.overrides),
    ]  # fmt: skip
    try:
        with (
            serving_replicas(folder, config, shape.replicas, extra=extra)
            if shape.tp == 1
            else serving(folder, config, tp=shape.tp, extra=extra)
        ) as servers:
            first = servers[0] if isinstance(servers, list) else servers
            with training(first, folder / "state", tp=options.tp, overrides=overrides) as trainer:
                return [_row(case, run_job(trainer, _job(case), first, options)) for case in cases]
    except ApolloTpError as error:
        return [{"case": case, "failed": str(error)[:200]} for case in cases]


def _job(case: str) -> Case:
    return Case(SHAPES[case].sequences * SHAPES[case].replicas)


def _row(case: str, row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with the optimizer's bytes as a number."""
    found = re.search(r"([0-9.e-]+) GB of state", row.get("optimizer", ""))
    state = float(found[1]) if found else None
    return {"case": case, "replicas": SHAPES[case].replicas, "state_gb": state} | row


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"bench_replicas: {device_name()}, {options.tokens:,} tokens a sequence, {datetime.date.today()}"
    )
    columns = (
        "case",
        "tokens a step",
        "tokens/s",
        "step s",
        "exposed exchange",
        "state GB",
        "peak GB beyond the weights",
    )
    for column in columns:
        table.add_column(column)
    alone = next((r["step_seconds"] for r in results if r["case"] == "alone-1x" and "failed" not in r), None)
    for r in results:
        if "failed" in r:
            table.add_row(r["case"], r["failed"])
            continue
        exposed = "-"
        if r["case"] == "replicas-1x" and alone:
            r["exposed_share"] = 1 - alone / r["step_seconds"]
            exposed = f"{100 * r['exposed_share']:.1f} %"
        state = f"{r['state_gb']:.2f}" if r.get("state_gb") is not None else "-"
        peak = ", ".join(f"{gb:.1f}" for gb in r["beyond_weights_gb"])
        table.add_row(
            r["case"], f"{r['tokens_per_step']:,}", f"{r['tokens_per_second']:,.0f}", f"{r['step_seconds']:.3f}", exposed,
            state, peak,
        )  # fmt: skip
    Console(width=140).print(table)
    write_results(options.out, "replicas", 2, results)


if __name__ == "__main__":
    sys.exit(main())
