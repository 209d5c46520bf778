"""How long does one optimizer step take, and how far is that from what the memory bus allows?

    python benchmarks/bench_optimizer.py                          # a GPU: the linear layers of an 8B model at TP = 2
    python benchmarks/bench_optimizer.py --model tiny --steps 2    # CPU: shows that it runs; its times mean nothing
    python benchmarks/bench_optimizer.py --state                   # state memory of whole models, no device needed

Measures on the same tensors: the device's copy bandwidth; this optimizer in each precision; the same update in plain
torch; torch's fused AdamW. One process: exchanges between ranks are local copies of the same shape.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from apollo_tp.config import OptimConfig, OptimizerKind, Precision
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.optim.torch_backend import TorchBackend
from apollo_tp.shards.boxes import Shard
from apollo_tp.training.estimate import LocalGroup, rank_parameters

# (name, global rows, global columns, cut dimension): the linear layers of one block
LLAMA_8B = [
    ("q_proj", 4096, 4096, 0),
    ("k_proj", 1024, 4096, 0),
    ("v_proj", 1024, 4096, 0),
    ("o_proj", 4096, 4096, 1),
    ("gate_proj", 12288, 4096, 0),
    ("up_proj", 12288, 4096, 0),
    ("down_proj", 4096, 12288, 1),
]
QWEN_27B_FULL = [
    ("q_proj", 12288, 5120, 0),
    ("k_proj", 1024, 5120, 0),
    ("v_proj", 1024, 5120, 0),
    ("o_proj", 5120, 6144, 1),
    ("gate_proj", 17408, 5120, 0),
    ("up_proj", 17408, 5120, 0),
    ("down_proj", 5120, 17408, 1),
]
TINY = [("q_proj", 128, 128, 0), ("k_proj", 64, 128, 0), ("o_proj", 128, 128, 1), ("up_proj", 384, 128, 0)]
PROJECT_TILES = [(128, 64), (64, 128), (128, 128), (64, 64), (256, 64)]
WRITE_TILES = [(8, 512), (4, 1024), (16, 512), (8, 256), (2, 1024), (1, 2048), (4, 512), (2, 2048)]
"""What --tune tries."""
MODELS = {"llama-8b-tp2": (LLAMA_8B, 36, 2), "qwen-27b-attention-tp4": (QWEN_27B_FULL, 16, 4), "tiny": (TINY, 2, 2)}


def make_parameters(model: str, device: str) -> list[OptimParameter]:
    """bf16 weights and gradients of one rank."""
    layers, count, size = MODELS[model]
    parameters = []
    for layer, (name, rows, columns, dim) in itertools.product(range(count), layers):
        shape = (rows, columns)
        shard = Shard(f"layers.{layer}.{name}.weight", shape, dim, ((0, shape[dim] // size),), (0,))
        tensor = torch.nn.Parameter(torch.randn(shard.local_shape, device=device, dtype=torch.bfloat16) * 0.02)
        tensor.grad = torch.randn(shard.local_shape, device=device, dtype=torch.bfloat16) * 1e-4
        parameters.append(OptimParameter(shard, tensor, "matrix"))
    return parameters


def seconds(run: Callable[[], object], steps: int, device: str) -> float:
    """Median wall time of ``run`` after two warm-up calls, the device idle before and after each."""
    times = []
    for i in range(steps + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written per second by a copy of 2 GiB (CPU: 64 MiB)."""
    source = torch.empty(2**30 if device == "cuda" else 2**25, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 10, device)


def traffic(optimizer: Optimizer) -> tuple[int, int]:
    """(floor, all) bytes that a step moves: two reads of G, one read and write of W and remainder; and the moments.

    Moments: R written once and read twice, m and v read twice and written once, all fp32.
    """
    elements = sum(w.data.numel() for w in optimizer.weights)
    rest = {Precision.remainder: 1, Precision.remainder16: 2}.get(optimizer.precision, 0)
    floor = elements * (8 + 2 * rest)
    state = sum(g.exp_avg.numel() for g in optimizer.update_group.groups)
    return floor, floor + 4 * state * (3 + 2 * 2 + 2)


def measure(parameters: list[OptimParameter], args: argparse.Namespace, bandwidth: float) -> list[tuple]:
    """Rows of the table: what, seconds, of which the device works, seconds of the two-pass floor, bytes by formula, share of
    the copy bandwidth, bytes of state."""
    size = MODELS[args.model][2]
    elements, rows = sum(p.tensor.numel() for p in parameters), []
    variants = [(kind, precision, False) for precision in Precision for kind in (OptimizerKind.apollo,)]
    variants += [
        (OptimizerKind.apollo_mini, Precision.remainder, False),
        (OptimizerKind.adamw, Precision.remainder, False),
    ]
    variants += [(OptimizerKind.apollo, Precision.stochastic, True)]
    for kind, precision, plain in variants:
        if kind is OptimizerKind.adamw and elements > 1e9 and args.device == "cuda" and not args.all:
            continue
        config = OptimConfig(kind=kind, rank=args.rank, lr=1e-6, check_replicas_every=0, refresh_every=10**6)
        optimizer = Optimizer(config, precision, parameters, LocalGroup(0, size))
        if plain:
            group = optimizer.update_group
            group.backend = TorchBackend(group.groups, group.adamw, config)
        took = seconds(optimizer.step, 3 if plain else args.steps, args.device)
        outcome = optimizer.step()
        assert not outcome.skipped, outcome.skipped
        label = f"{kind.value}, {precision.value}" + (", plain torch" if plain else "")
        floor, moved = (elements * 36, elements * 36) if kind is OptimizerKind.adamw else traffic(optimizer)
        busy = math.nan if plain else device_seconds(optimizer.step, args.device)
        rows.append((label, took, busy, floor / bandwidth, moved, moved / took / bandwidth, optimizer.state_bytes()))
        del optimizer
    theirs = torch.optim.AdamW([p.tensor for p in parameters], lr=1e-6, fused=True)
    took = seconds(theirs.step, args.steps, args.device)
    moved = elements * 2 * 7  # bf16: read W, G, m, v; write W, m, v
    busy = device_seconds(theirs.step, args.device)
    label = "torch fused AdamW, bf16 state"
    rows.append((label, took, busy, moved / bandwidth, moved, moved / took / bandwidth, elements * 4))
    return rows


def heading(args: argparse.Namespace, elements: int) -> list[str]:
    """What was measured, when, on what and by which command."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return [
        f"# One optimizer step: {args.model}, {elements / 1e9:.3g}e9 bf16 parameters, rank {args.rank}",
        "",
        f"{datetime.date.today()}, {device}, torch {torch.__version__}",
        f"Command: `python {' '.join(sys.argv)}`",
    ]


def report(rows: list[tuple], args: argparse.Namespace, elements: int, bandwidth: float) -> str:
    """The table of ``measure`` as Markdown."""
    lines = [
        *heading(args, elements),
        f"Copy bandwidth {bandwidth / 1e12:.3g} TB/s",
        "",
        "| optimizer | ms | device busy, ms | two-pass floor, ms | GB by formula | share of copy bandwidth | state, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, took, busy, floor, moved, share, state in rows:
        device_ms = "-" if math.isnan(busy) else f"{busy * 1e3:.3g}"
        lines.append(
            f"| {label} | {took * 1e3:.3g} | {device_ms} | {floor * 1e3:.3g} | {moved / 1e9:.3g} | {share:.0%} | "
            f"{state / 1e9:.3g} |"
        )
    return "\n".join(lines) + "\n"


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """(milliseconds on the device, launches) by kernel, of one ``run``. CUDA only."""
    with torch.profiler.profile() as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.key.split("(")[0][:60]
            took, count = found[name]
            found[name] = took + event.self_device_time_total / 1e3, count + event.count
    return found


def phases(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the device by kernel, of one ``run``. CUDA only."""
    return {name: took for name, (took, _) in kernel_times(run).items()}


def device_seconds(run: Callable[[], object], device: str) -> float:
    """What the device works in one ``run``, its pauses between kernels left out; NaN on a CPU."""
    return sum(phases(run).values()) / 1e3 if device == "cuda" else math.nan


def tune(parameters: list[OptimParameter], args: argparse.Namespace) -> None:
    """Time the two large kernels for several tiles, in each precision that a tile may suit; the best last. CUDA only."""
    import triton

    from apollo_tp.optim import triton_backend as module

    config = OptimConfig(rank=args.rank, lr=1e-6, check_replicas_every=0, refresh_every=10**6)
    projections = [(tile, w, s) for tile in PROJECT_TILES for w in (4, 8) for s in (2, 3, 4)]
    writes = [(tile, w, 0) for tile in WRITE_TILES for w in (4, 8)]
    for precision in (Precision.stochastic, Precision.remainder):
        optimizer = Optimizer(config, precision, parameters, LocalGroup(0, MODELS[args.model][2]))
        optimizer.step()
        print(precision.value, {k: round(v, 3) for k, v in phases(optimizer.step).items() if v > 0.02})
        candidates = [("write", *w) for w in writes]
        if precision is Precision.stochastic:  # the projection knows nothing of precision
            candidates += [("project", *p) for p in projections]
        results = []
        for kernel, tile, warps, stages in candidates:
            tiles = dict.fromkeys((False, True), tile) if kernel == "write" else tile
            chosen = {f"{kernel.upper()}_TILE": tiles, f"{kernel.upper()}_WARPS": warps, "PROJECT_STAGES": stages}
            before = {name: getattr(module, name) for name in chosen}
            try:
                for name, value in chosen.items():
                    if value:
                        setattr(module, name, value)
                group = optimizer.update_group
                group.backend = module.TritonBackend(group.groups, group.adamw, config, group.weights)
                optimizer.step()
                took = [sum(v for k, v in phases(optimizer.step).items() if k.startswith(kernel)) for _ in range(3)]
                results.append((kernel, min(took), tile, warps, stages))
            except triton.runtime.errors.OutOfResources as error:
                print(f"{kernel} {tile} {warps} {stages}: {error}")
            finally:
                for name, value in before.items():
                    setattr(module, name, value)
        for kernel, took, *what in sorted(results, key=lambda row: (row[0], -row[1])):
            print(f"{took:8.3f} ms  {precision.value} {kernel} {what}")
        del optimizer


def state_rows(size: int, rank: int) -> list[str]:
    """Table rows: optimizer state of a rank for two models, from transformers' and this package's classes on meta."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    qwen = Qwen3_5TextConfig(
        vocab_size=248320,
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=64,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=False,
    )
    rows = []
    for label, model_class, config in (
        ("Llama-3-8B", LlamaForCausalLM, llama),
        ("Qwen3.5-27B", Qwen3_5ForCausalLM, qwen),
    ):
        with torch.device("meta"):
            named = dict(model_class(config).bfloat16().named_parameters())
        for kind, precision in (
            (OptimizerKind.adamw, Precision.stochastic),
            (OptimizerKind.apollo, Precision.stochastic),
            (OptimizerKind.apollo, Precision.remainder),
            (OptimizerKind.apollo, Precision.remainder16),
            (OptimizerKind.apollo_mini, Precision.stochastic),
        ):
            options = OptimConfig(kind=kind, rank=rank)
            optimizer = Optimizer(options, precision, rank_parameters(named, size), LocalGroup(0, size))
            elements = sum(w.data.numel() for w in optimizer.weights)
            state = optimizer.state_bytes()
            rows.append(
                f"| {label} | {size} | {kind.value}, {precision.value} | {elements * 2 / 1e9:.2f} | {state / 1e9:.2f} | "
                f"{state / elements:.2f} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8b-tp2" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tune", action="store_true", help="try tile sizes instead (CUDA)")
    parser.add_argument(
        "--all", action="store_true", help="also this package's AdamW with fp32 state: 9 bytes per parameter"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--state", action="store_true", help="print the optimizer state of whole models instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.state:
        lines = ["| model | TP | optimizer | weights on a rank, GB | state on a rank, GB | bytes per parameter |"]
        lines += ["|---|---|---|---|---|---|", *(row for size in (1, 2, 4) for row in state_rows(size, args.rank))]
        print("\n".join(lines))
        return
    parameters = make_parameters(args.model, args.device)
    if args.tune:
        tune(parameters, args)
        return
    bandwidth = copy_bandwidth(args.device)
    rows = measure(parameters, args, bandwidth)
    text = report(rows, args, sum(p.tensor.numel() for p in parameters), bandwidth)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
