"""Which shares of a GPU's multiprocessors (SMs) multiply right under CUDA MPS?

    python benchmarks/bench_shares.py --out benchmarks/results              # a GPU, the layers of an 8.19B Qwen3 at TP = 2
    python benchmarks/bench_shares.py --by-mps --out benchmarks/results     # the SMs that MPS itself grants a client
    python benchmarks/bench_shares.py --tiny                                # rehearsal on any machine, without MPS

For each share a process of its own, some at a time, tries the products that a trainer tries before its first step
(``gpu_sharing/product_check.py``), on SMs taken as ``qos.sm_percent`` takes them. What is wrong is wrong; what is not found
wrong at the lengths tried may be right.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, device_name, mps_daemon, write_results

from apollo_tp.gpu_sharing.product_check import MPS_SHARE, sampled_lengths, wrong_products
from apollo_tp.gpu_sharing.sm_limit import limit_sms

AT_ONCE = 4
"""Processes, which share the GPU's memory."""
CHILD_SECONDS = 120


def local_layers(config: dict[str, Any], tp: int) -> list[tuple[int, int]]:
    """(rows, columns) of a rank's layers, joined as they are served."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return [
        ((heads + 2 * kv_heads) * head // tp, hidden),
        (hidden, heads * head // tp),
        (2 * config["intermediate_size"] // tp, hidden),
        (hidden, config["intermediate_size"] // tp),
        (config["vocab_size"] // tp, hidden),
    ]


def try_products(options: argparse.Namespace) -> dict[str, Any]:
    """In this process: the SMs that CUDA grants it, and what is wrong."""
    cuda, sms = torch.cuda.is_available(), 0
    device, config = torch.device("cuda:0" if cuda else "cpu"), TINY if options.tiny else QWEN3_8B
    if cuda:
        sms = limit_sms(device, None if options.by_mps else options.percent[0])
    lengths = sampled_lengths(options.tokens)
    wrong = [
        line
        for shape in local_layers(config, options.tp)
        for line in wrong_products(*shape, torch.bfloat16, lengths, device)
    ]
    return {"sms": sms, "wrong": len(wrong), "first_wrong": wrong[:3]}


def try_share(percent: int, environment: dict[str, str]) -> dict[str, Any]:
    """In a process that MPS gives this share."""
    share = {MPS_SHARE: str(percent) if "--by-mps" in sys.argv else "100"} if environment else {}
    done = subprocess.run(
        [sys.executable, *sys.argv, "--child", "--percent", str(percent)], env=os.environ | environment | share,
        capture_output=True, text=True, timeout=CHILD_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"percent": percent, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return {"percent": percent, **json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--percent", type=int, nargs="+", default=[25, *range(50, 100, 2), 100], help="shares to try")
    parser.add_argument("--by-mps", action="store_true", help="have MPS limit the process")
    parser.add_argument("--tokens", type=int, default=4096, help="the longest micro-batch")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(try_products(options)))
        return 0
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as folder, contextlib.ExitStack() as stack:
        environment: dict[str, str] = {}
        if shutil.which("nvidia-cuda-mps-control"):
            environment = stack.enter_context(mps_daemon(Path(folder)))
        else:
            print("no nvidia-cuda-mps-control on PATH: the whole device alone")
            options.percent = [100]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = list(pool.map(lambda percent: try_share(percent, environment), options.percent))
    report(rows, options)
    return int(any("failed" in row for row in rows))


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    how = "as MPS grants them" if options.by_mps else "in a green context"
    today = datetime.date.today().isoformat()
    table = Table(title=f"bench_shares, SMs {how}: {device_name()}, torch {torch.__version__}, {today}")
    for column in ("percent", "SMs", "products wrong", "the first"):
        table.add_column(column)
    for row in rows:
        first = row["failed"] if "failed" in row else (row["first_wrong"] or [""])[0]
        table.add_row(str(row["percent"]), str(row.get("sms", "-")), str(row.get("wrong", "-")), first)
    Console(width=150).print(table)
    write_results(options.out, "shares_by_mps" if options.by_mps else "shares", options.tp, rows)


if __name__ == "__main__":
    sys.exit(main())
