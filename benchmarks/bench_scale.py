"""One job of a large model beside a live vLLM server: does it fit, where does the memory go, and what do ranks add?

    python benchmarks/bench_scale.py --tp 1 2 --out benchmarks/results                 # 8.19B at TP = 1 and at TP = 2
    python benchmarks/bench_scale.py --model qwen3.5-27b --tp 1                        # 27B on one GPU of 139 GiB
    python benchmarks/bench_scale.py --model tiny-qwen3.5 --tp 1 2                     # rehearsal on any machine

The weights are random: nothing is downloaded. A column is one server and one job at one TP. Memory of a rank: served weights
from its manifest; optimizer state from this package's own classes over the same shards, without memory behind them; the
peak beyond the weights from the trainer; what the server holds and what is free from nvidia-smi. Phases of a step are
host times, whose sum is exact: the optimizer's contain the wait for the end of the backward pass.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from server_stack import (
    QWEN3_8B,
    QWEN3_32B,
    QWEN35_27B_TEXT,
    TINY_QWEN35_TEXT,
    Served,
    device_name,
    qwen35,
    random_samples,
    serving,
    tflops_per_gpu,
    training,
    write_results,
)
from transformers import Qwen3_5Config, Qwen3Config

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.shards.placement import place
from apollo_tp.training.estimate import LocalGroup

LOW_MEMORY = ("train.gradients=in_backward", "optim.max_grad_norm=null", "train.gradient_checkpointing=true")
"""Gradients are freed in the backward pass (which rules out clipping), activations computed again: what lets 27B fit."""
NO_REMAINDER = "train.precision=stochastic"
"""The remainders of 27B take another 13 GB on each of two GPUs, which may be too much of 80."""

# Text alone, and vLLM's own Triton kernel for prefills: on Hopper it would take flashinfer's, installed or not.
QWEN35_SERVER = ("--language-model-only", "--gdn-prefill-backend", "triton")
START_SECONDS = 400
UNTUNED = Path(__file__).with_name("no_triton_autotune")


@dataclass(frozen=True)
class Model:
    """A shape, and how it is served (``memory``: vLLM's share of the GPU) and trained."""

    config: dict[str, Any]
    memory: float
    config_class: type = Qwen3Config
    server: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    tokens: int = 4096


MODELS = {
    "qwen3-8b": Model(QWEN3_8B, 0.3),
    "qwen3-32b": Model(QWEN3_32B, 0.55, overrides=LOW_MEMORY),
    "qwen3.5-27b": Model(qwen35(QWEN35_27B_TEXT), 0.5, Qwen3_5Config, QWEN35_SERVER, (*LOW_MEMORY, NO_REMAINDER)),
    "tiny-qwen3.5": Model(qwen35(TINY_QWEN35_TEXT), 0.3, Qwen3_5Config, QWEN35_SERVER, LOW_MEMORY, 64),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="tensor-parallel sizes, a server each")
    parser.add_argument("--tokens", type=int, help="tokens of a step, in one sequence (default: by model)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--overrides", default="", help="further options of the trainer, in one string")
    parser.add_argument(
        "--untuned", action="store_true", help="Triton's kernels are not autotuned, which takes minutes"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    if options.untuned:  # for the processes that this one starts
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(UNTUNED), os.environ.get("PYTHONPATH")]))
    options.tokens = options.tokens or MODELS[options.model].tokens
    columns = [measure(MODELS[options.model], tp, options) for tp in options.tp]
    report(columns, options)
    return 0


def measure(model: Model, tp: int, options: argparse.Namespace) -> dict[str, Any]:
    """One server and one job; the first two steps (compilation, allocation) are not counted."""
    overrides = [
        f"train.max_sequence_tokens={options.tokens}", f"train.max_micro_batch_tokens={options.tokens}", "optim.lr=1e-6",
        *model.overrides, *shlex.split(options.overrides),
    ]  # fmt: skip
    server = [*model.server, "--gpu-memory-utilization", str(model.memory), *shlex.split(options.server_args)]
    before = used_bytes()
    with (
        tempfile.TemporaryDirectory(prefix="apollo_tp-") as name,
        serving(Path(name), model.config, tp=tp, extra=server, config_class=model.config_class) as served,
    ):
        serving_only = used_bytes()
        with training(served, Path(name) / "state", tp=tp, overrides=overrides, seconds=START_SECONDS) as trainer:
            hello = trainer.status()["trainer"]
            samples = random_samples(1, options.tokens, hello["vocab_size"])
            job = trainer.submit({"samples": samples, "epochs": options.steps, "batch_size": 1, "wait": True})
            assert job["state"] == "succeeded", job["error"]
            steps, both = trainer.steps(job["id"]), used_bytes()
            assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200, "the server does not answer"
        parts = state_parts(served, overrides)
        weights = served.weight_bytes()[0]
    gradients = steps[-1]["gradients"]
    peak = (steps[-1].get("peak_memory_bytes") or [0])[0]
    return {
        "tp": tp, "tokens_per_step": options.tokens, "num_parameters": hello["num_parameters"], "gradients": gradients,
        "overrides": overrides, "server_options": server, "untuned": options.untuned, "memory_plan": hello["memory"],
        "optimizer": hello["optimizer"],
        **speed(steps[2:], hello["num_parameters"], options.tokens, tp),
        "memory_bytes": memory_rows(weights, parts, gradients, peak, (before, serving_only, both)),
    }  # fmt: skip


def speed(steps: list[dict[str, Any]], parameters: int, tokens: int, tp: int) -> dict[str, Any]:
    """Medians over the completed steps."""
    phases = ("step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
    seconds = {phase: statistics.median(step[phase] for step in steps) for phase in phases}
    return seconds | {
        "tokens_per_second": tokens / seconds["step_seconds"],
        "tflops_per_gpu": tflops_per_gpu(parameters, tokens, seconds["step_seconds"], tp),
        "skipped": sum(bool(step.get("skipped")) for step in steps),
        "train_loss": [step.get("train_loss") for step in steps],
    }


def state_parts(served: Served, overrides: list[str]) -> dict[str, int]:
    """Bytes of rank 0's optimizer state by part, for the optimizer options that ``overrides`` leave alone."""
    chosen = dict(option.split("=", 1) for option in overrides)
    config = OptimConfig(rank=int(chosen.get("optim.rank", OptimConfig.rank)))
    manifests = served.manifests()
    parameters = []
    for name, placement in place(manifests)[0].items():
        shard, dtype = placement.shard, getattr(torch, placement.dtype)
        tensor = torch.nn.Parameter(torch.empty(shard.local_shape, dtype=dtype, device="meta"))
        embedding = "embed_tokens" in name or "lm_head" in name
        role = "embedding" if embedding else "matrix" if len(shard.global_shape) == 2 else "other"
        parameters.append(OptimParameter(shard, tensor, role))
    precision = Precision(chosen.get("train.precision", Precision.remainder.value))
    optimizer = Optimizer(config, precision, parameters, LocalGroup(0, len(manifests)))
    moments = [sum(g.exp_avg.nbytes + g.exp_avg_sq.nbytes for g in groups)
               for groups in (optimizer.update_group.groups, optimizer.update_group.adamw.values())]  # fmt: skip
    return {
        "projected moments": moments[0],
        "AdamW moments": moments[1],
        "remainders": optimizer.state_bytes() - sum(moments),
    }


def memory_rows(
    weights: int, state: dict[str, int], gradients: str, peak: int, used: tuple[int, int, int] | tuple[None, None, None]
) -> dict[str, int | None]:
    """Bytes of rank 0 and its GPU by part. ``peak`` is the trainer's, beyond the weights, 0 without a GPU; ``used`` is what
    nvidia-smi says before the server, beside the server alone, and beside both."""
    before, serving_only, both = used
    stored = weights if gradients == "stored" else 0
    rows: dict[str, int | None] = {"served weights": weights}
    rows |= {f"optimizer: {part}": size for part, size in state.items()}
    rows["gradients kept"] = stored
    rows["activations and workspace at the peak"] = peak - sum(state.values()) - stored if peak else None
    rows["trainer's peak beyond the weights"] = peak or None
    known = before is not None and serving_only is not None and both is not None
    rows["vLLM's KV cache, graphs and contexts"] = serving_only - before - weights if known else None
    rows["trainer on the device, with its context"] = both - serving_only if known else None
    rows["in use on the device"] = both
    rows["device"] = device_bytes()
    return rows


def used_bytes() -> int | None:
    """Bytes in use on the first GPU, by whomever; None without one. Asked of nvidia-smi, which takes no memory there."""
    return _nvidia_smi("memory.used")


def device_bytes() -> int | None:
    return _nvidia_smi("memory.total")


def _nvidia_smi(field: str) -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def report(columns: list[dict[str, Any]], options: argparse.Namespace) -> None:
    title = (
        f"bench_scale: {options.model}, 1 x {options.tokens:,} tokens a step, {device_name()}, {datetime.date.today()}"
    )
    table = Table(title=title, caption=" ".join([*MODELS[options.model].overrides, options.overrides]) or None)
    table.add_column("")
    for column in columns:
        table.add_column(f"TP = {column['tp']}", justify="right")
    formats = {
        "num_parameters": "{:,}", "gradients": "{}", "tokens_per_second": "{:,.0f}", "tflops_per_gpu": "{:.1f}",
        "step_seconds": "{:.3f}", "forward_seconds": "{:.3f}", "backward_seconds": "{:.3f}",
        "optimizer_seconds": "{:.3f}", "skipped": "{}",
    }  # fmt: skip
    for key, text in formats.items():
        table.add_row(key.replace("_", " "), *(text.format(c[key]) for c in columns))
    table.add_section()
    for part in columns[0]["memory_bytes"]:
        sizes = [c["memory_bytes"][part] for c in columns]
        table.add_row(f"GB a rank, {part}", *("-" if size is None else f"{size / 1e9:.2f}" for size in sizes))
    Console(width=120).print(table)
    write_results(options.out, f"scale_{options.model}", max(options.tp), columns)


if __name__ == "__main__":
    sys.exit(main())
