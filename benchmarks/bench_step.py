"""Training speed and memory beside a live vLLM server: tokens/s, TFLOP/s per GPU, peak memory beyond the served weights.

    python benchmarks/bench_step.py --out benchmarks/results            # 2 GPUs, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_step.py --tiny                              # rehearsal on any machine

TFLOP/s counts 6 x parameters x tokens (recomputation is not counted as work). The server is up and idle during the steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import shlex
import socket
import statistics
import sys
import tempfile
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from apollo_tp.demo.processes import coordinator_url, start_server, start_trainer

QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16",
}  # fmt: skip
TINY = QWEN3_8B | {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 16,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine, 64 tokens per sequence")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    tokens = 64 if options.tiny else 4096
    cases = [
        {"sequences": 1, "recompute": False},
        {"sequences": 4, "recompute": False},
        {"sequences": 4, "recompute": True},
    ]
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as folder:
        results = run(Path(folder), options, cases, tokens)
    report(results, options, tokens)
    return 0


def run(folder: Path, options: argparse.Namespace, cases: list[dict], tokens: int) -> list[dict]:
    model, runtime_dir = folder / "model", folder / "rt"
    runtime_dir.mkdir(mode=0o700)
    Qwen3Config(**(TINY if options.tiny else QWEN3_8B)).save_pretrained(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    extra = ["--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "8192"]
    extra += shlex.split(options.server_args)
    server = start_server(model, port, runtime_dir, folder / "server.log", tensor_parallel=options.tp, extra=extra)
    try:
        server.wait_for(f"http://127.0.0.1:{port}/health", 400)
        return [measure(folder, runtime_dir, options, case, tokens) for case in cases]
    finally:
        server.stop()


def measure(folder: Path, runtime_dir: Path, options: argparse.Namespace, case: dict, tokens: int) -> dict:
    """One trainer per case; the first two steps (compilation, allocation) are not counted."""
    state = folder / f"state-{case['sequences']}-{case['recompute']}"
    state.mkdir()
    overrides = [
        f"train.max_sequence_tokens={tokens}", f"train.max_micro_batch_tokens={tokens}", "optim.lr=1e-6",
        f"train.gradient_checkpointing={str(case['recompute']).lower()}", "checkpoint.after_idle_seconds=null",
        "server.instance=demo", "optim.max_relative_update=1000",
    ]  # fmt: skip
    trainer = start_trainer(runtime_dir, state, state / "trainer.log", num_ranks=options.tp, overrides=overrides)
    try:
        url = coordinator_url(runtime_dir, trainer, seconds=240)
        hello = httpx.get(f"{url}/train/status", timeout=30).json()["trainer"]
        draw = random.Random(0)
        ids = [[draw.randrange(hello["vocab_size"]) for _ in range(tokens)] for _ in range(case["sequences"])]
        body = {
            "samples": [{"context_ids": row[:1], "continuation_ids": row[1:]} for row in ids],
            "epochs": options.steps, "batch_size": case["sequences"], "wait": True,
        }  # fmt: skip
        job = httpx.post(f"{url}/train", json=body, timeout=400).raise_for_status().json()
        assert job["state"] == "succeeded", job["error"]
        events = httpx.get(f"{url}/train/jobs/{job['id']}/events", timeout=30).json()["data"]
        steps = [event["data"] for event in events if event.get("type") == "metrics"][2:]
        status = httpx.get(f"{url}/train/status", timeout=30).json()
    except Exception:
        print(trainer.tail(), file=sys.stderr)
        raise
    finally:
        trainer.stop()
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
        "optimizer": hello["optimizer"],
    }  # fmt: skip


def report(results: list[dict], options: argparse.Namespace, tokens: int) -> None:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    today = datetime.date.today().isoformat()
    table = Table(title=f"bench_step: TP = {options.tp}, {options.tp} x {device}, {today}")
    for column in ("batch", "recompute", "tokens/s", "TFLOP/s per GPU", "step s", "peak GB beyond weights"):
        table.add_column(column)
    for r in results:
        memory = ", ".join(f"{gb:.1f}" for gb in r["peak_memory_gb"])
        table.add_row(
            f"{r['sequences']} x {tokens}", str(r["recompute"]), f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops_per_gpu']:.1f}", f"{r['step_seconds']:.3f}", memory,
        )  # fmt: skip
    Console(width=120).print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {
            "date": today,
            "device": device,
            "tp": options.tp,
            "command": shlex.join(sys.argv),
            "results": results,
        }
        (options.out / f"{today}_step.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
