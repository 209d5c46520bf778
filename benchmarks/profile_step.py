"""Where does the time of a step go? Without a server: one rank's share of a model in one process, or all ranks.

    python benchmarks/profile_step.py            # a GPU: the shapes of one rank of an 8.19B Qwen3 at TP = 2
    torchrun --nproc-per-node 2 benchmarks/profile_step.py      # two GPUs: both ranks, with their sums
    torchrun --nproc-per-node 2 benchmarks/profile_step.py --replicas 2     # each GPU a replica at TP = 1
    python benchmarks/profile_step.py --tiny     # rehearsal on any machine

A model of half the heads, half the feed-forward width and half the vocabulary has exactly the matrices of one rank of two:
its step is that rank's computation. What one process misses is the sums over ranks (two per layer and direction, and the
optimizer's). Weights lie in memory as vLLM keeps them: query, key and value rows, and gate and up rows, side by side. With
replicas the table has the exchange between them by itself too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, device_name, write_results
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from apollo_tp.config import GradientMode, Matmul, OptimConfig, Precision
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.gpu_sharing.sm_limit import limit_sms
from apollo_tp.model import bind_model, fp8, fp8_linear, joined
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.optim import Optimizer
from apollo_tp.shards.boxes import Shard
from apollo_tp.training.cuda_graphs import GraphCache
from apollo_tp.training.memory_profiling import CudaMeter, plan_memory
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample

TIMEOUT = datetime.timedelta(seconds=120)
RANK_OF_TWO = {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 6144, "vocab_size": 75968}
CUT_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
CUT_COLUMNS = ("o_proj", "down_proj")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

CATEGORIES = (
    ("casts to FP8", ("cast_kernel", "cast_rows_kernel")),
    ("sums over ranks", ("nccl",)),
    ("attention", ("flash", "fmha")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas")),
    ("optimizer", ("project_kernel", "write_kernel", "rows_kernel", "commit", "adamw_kernel", "unpack_signs")),
    ("copies and fills", ("memcpy", "memset", "fillfunctor", "copy_kernel", "catarray")),
)
"""Kernels by a part of their name; what fits none is elementwise work and reductions."""


def shard_of(name: str, shape: tuple[int, ...], tp: TPGroup) -> Shard:
    """What this rank holds of a checkpoint tensor of global ``shape``."""
    owner = name.split(".")[-2]
    dim = 0 if owner in CUT_ROWS else 1 if owner in CUT_COLUMNS else None
    if dim is None or tp.size == 1:
        return Shard(name, shape, None, (), tuple(range(tp.size)))
    share = shape[dim] // tp.size
    return Shard(name, shape, dim, ((tp.rank * share, (tp.rank + 1) * share),), (tp.rank,))


def served_memory(
    config: PretrainedConfig, device: str, tp: TPGroup
) -> tuple[dict[str, tuple[Shard, Tensor]], list[list[str]]]:
    """Every checkpoint tensor of ``config`` as this rank holds it, random; and the names of fused tensors."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, tuple[Shard, Tensor]] = {}
    side_by_side: list[list[str]] = []
    for name in shapes:
        if name in shards:
            continue
        group = next((g for g in FUSED if any(f".{part}." in name for part in g)), None)
        names = [name.replace(f".{group[0]}.", f".{part}.") for part in group] if group else [name]
        parts = [shard_of(n, shapes[n], tp) for n in names]
        rows = [part.local_shape[0] for part in parts]
        fused = torch.empty(sum(rows), *parts[0].local_shape[1:], dtype=torch.bfloat16, device=device)
        fused.normal_(0, 0.02) if fused.ndim > 1 else fused.fill_(1.0)
        for shard, tensor in zip(parts, fused.split(rows), strict=True):
            shards[shard.name] = (shard, tensor)
        if group:
            side_by_side.append(names)
    return shards, side_by_side


@contextlib.contextmanager
def ranks() -> Iterator[TPGroup]:
    """The ranks that torchrun started, one GPU each if there are any; one rank without torchrun."""
    if not dist.is_torchelastic_launched():
        yield TPGroup.single()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield TPGroup.world("nccl" if cuda else "gloo", TIMEOUT)
    finally:
        dist.destroy_process_group()


def categories(profile: Any) -> dict[str, float]:
    """Milliseconds of GPU time by category."""
    totals: dict[str, float] = defaultdict(float)
    for event in kernels(profile):
        name = event.key.lower()
        label = next((label for label, parts in CATEGORIES if any(part in name for part in parts)), "elementwise")
        totals[label] += event.self_device_time_total / 1e3
    return dict(totals)


def gaps(profile: Any, count: int) -> tuple[float, list[str]]:
    """Milliseconds between first and last kernel in which the device had none, and the longest such gaps."""
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    total, found, end, last = 0.0, [], events[0][1], events[0][2]
    for start, stop, name in events:
        if start > end:
            total += start - end
            found.append((start - end, (end - events[0][0]) / 1e3, last, name))
        if stop > end:
            end, last = stop, name
    lines = [
        f"{us / 1e3:7.2f} ms idle at {at:7.1f}: {a[:50]} | {b[:50]}"
        for us, at, a, b in sorted(found, reverse=True)[:count]
    ]
    return total / 1e3, lines


def kernels(profile: Any) -> Iterator[Any]:
    return (e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, help="tokens of a step, in one sequence (default 4096; tiny 64)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=1, help="the ranks are divided into so many")
    parser.add_argument("--micro-batches", type=int, default=1, help="of --tokens each, in a step of each replica")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), default=Precision.remainder)
    parser.add_argument(
        "--gradients", choices=["stored", "in_backward"], default="stored", help="in_backward also stops clipping"
    )
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--matmul", type=Matmul, choices=list(Matmul), default=Matmul.served)
    parser.add_argument(
        "--fp8",
        nargs="+",
        default=[],
        help="constants of fp8.py and fp8_linear.py: PER_ROW=False, GRADIENTS=float8_e4m3fn",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--inductor", nargs="+", default=[], help="settings to switch on: coordinate_descent_tuning, ..."
    )
    parser.add_argument("--peer-memory", action=argparse.BooleanOptionalAction, default=True, help="of two GPUs")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True, help="of sums and products")
    parser.add_argument("--same-kernels", action=argparse.BooleanOptionalAction, default=True, help="on every GPU")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay recorded passes")
    parser.add_argument("--sm-percent", type=int, help="of the GPU's multiprocessors, as qos.sm_percent")
    parser.add_argument("--late", action="store_true", help="replicas: copy weights beside the next step")
    parser.add_argument("--kernels", type=int, default=0, help="also print this many of the longest kernels")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    set_constants(options.fp8)
    for name in options.inductor:
        setattr(torch._inductor.config, name, True)
    if not options.overlap:
        joined.JoinedLinear.enter = lambda *_: None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = options.tokens or (64 if options.tiny else 4096)
    with ranks() as world:
        world.peers.enabled = options.peer_memory
        mesh = Mesh.build(world, world.size // options.replicas)
        whole = TINY if options.tiny else QWEN3_8B
        config = Qwen3Config(**(whole if options.tiny or world.size > 1 else whole | RANK_OF_TWO))
        if options.sm_percent:
            limit_sms(torch.device("cuda", torch.cuda.current_device()), options.sm_percent)
        result = run(config, tokens, device, mesh, options)
        if world.rank == 0:
            report(result, world, options)
    return 0


def set_constants(pairs: list[str]) -> None:
    """``NAME=VALUE``: a literal, or the name of one of torch's dtypes."""
    for name, _, text in (pair.partition("=") for pair in pairs):
        value = getattr(torch, text) if text.startswith("float8") else ast.literal_eval(text)
        (module,) = (module for module in (fp8, fp8_linear) if hasattr(module, name))
        setattr(module, name, value)


def report(result: dict[str, Any], world: TPGroup, options: argparse.Namespace) -> None:
    table = Table(
        title=f"profile_step: {world.size} x {device_name()}, torch {torch.__version__}, {datetime.date.today()}"
    )
    table.add_column("what")
    table.add_column("", justify="right")
    for key, value in result.items():
        table.add_row(key, f"{value:,.2f}" if isinstance(value, float) else str(value))
    Console(width=140).print(table)
    print(json.dumps(result))
    write_results(options.out, "profile", world.size, result)


def exchange(optimizer: Optimizer, device: str) -> dict[str, float]:
    """Milliseconds of the sums of gradients, and of the copy of weights, with nothing beside them. Collective."""
    assert optimizer.owners is not None
    found = {}
    for name, part in (
        ("sums of gradients", optimizer.owners.sum_gradients),
        ("copy of weights", optimizer.owners.publish),
    ):
        seconds = []
        for _ in range(4):
            optimizer.replicas.all_reduce_(torch.zeros(1, device=device)).item()
            begun = time.perf_counter()
            part()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        found[f"exchange alone ms, {name}"] = statistics.median(seconds[1:]) * 1e3
    return found


def run(config: PretrainedConfig, tokens: int, device: str, mesh: Mesh, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    tp = mesh.tp
    shards, fused_tensors = served_memory(config, device, tp)
    weights = torch.cuda.memory_allocated() if device == "cuda" else 0
    in_backward = options.gradients == "in_backward"
    optim = OptimConfig(
        lr=1e-6, max_grad_norm=None if in_backward else 1.0, max_relative_update=1e9, check_replicas_every=0,
    )  # fmt: skip
    compiled = CompileOptions(deterministic_kernels=options.same_kernels)
    model = bind_model(
        config, shards, tp, fused_tensors=fused_tensors, gradient_checkpointing=options.recompute,
        compiled=compiled if options.compile else None, fp8=options.matmul is Matmul.fp8,
    )  # fmt: skip
    optimizer = Optimizer(optim, options.precision, model.parameters, tp, mesh.replicas)
    trainer = Trainer(
        model, optimizer, tp, mesh=mesh, device=torch.device(device), max_micro_batch_tokens=tokens,
        gradients=GradientMode(options.gradients),
    )  # fmt: skip
    if options.late:
        trainer.publish_late()
    if device == "cuda":  # as at a trainer's start: shorter steps come first, and layers are compiled for any length
        plan = plan_memory(trainer, CudaMeter(trainer.device), tokens)
        if options.graphs and options.replicas == 1:
            trainer.record_passes(GraphCache(model, keep=plan.needed_with_graphs(keep=True) <= plan.available))
        print(plan.describe())
        planned = (plan.activations + plan.gradients + torch.cuda.memory_allocated() - weights) / 1e9
    ids = torch.randint(0, config.vocab_size, (tokens,)).tolist()
    sample = Sample(token_ids=ids, weights=[0.0] + [1.0] * (tokens - 1))
    samples = [sample] * (options.replicas * options.micro_batches)
    tokens *= len(samples)
    seconds = []
    begun = time.perf_counter()
    for _ in range(options.steps + 3):
        result = trainer.step(samples)
        assert not result.skipped, result.skipped
        seconds.append(result.step_seconds)
    first, step = time.perf_counter() - begun, statistics.median(seconds[3:])
    parameters = sum(p.tensor.numel() for p in model.parameters)
    measured: dict[str, Any] = {
        "tokens": tokens, "gradients": result.gradients, "precision": options.precision.value,
        "matmul": " ".join([options.matmul.value, *options.fp8]),
        "step ms": step * 1e3, "first step s": seconds[0], "all steps s": first, "tokens/s": tokens / step,
        "TFLOP/s (6 x parameters x tokens)": 6 * parameters * tokens / step / 1e12,
        "host ms": {k: round(getattr(result, f"{k}_seconds") * 1e3, 1) for k in ("forward", "backward", "optimizer")},
        "state GB": optimizer.state_bytes() / 1e9, "loss": result.loss,
    }  # fmt: skip
    if device == "cuda":
        measured["planned GB beyond weights"] = planned
        measured["peak GB beyond weights"] = (trainer.peak_memory_bytes() - weights) / 1e9
        with torch.profiler.profile() as profile:
            trainer.step(samples)
        measured |= {f"GPU ms, {k}": v for k, v in sorted(categories(profile).items(), key=lambda kv: -kv[1])}
        measured["GPU idle within the step, ms"], lines = gaps(profile, options.kernels // 3)
        longest = sorted(kernels(profile), key=lambda e: -e.self_device_time_total)[: options.kernels]
        print(*(lines if tp.rank == 0 else ()), sep="\n")
        for event in longest if tp.rank == 0 else ():
            print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x  {event.key[:150]}")
    return measured | (exchange(optimizer, device) if options.replicas > 1 else {})


if __name__ == "__main__":
    sys.exit(main())
