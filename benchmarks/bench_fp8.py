"""FP8 products against bf16 ones: rates of single products and casts, errors of gradients, and loss curves.

    python benchmarks/bench_fp8.py --products       # one GPU, shapes of the 8.19B model at TP = 1 and 2
    python benchmarks/bench_fp8.py --curve --error  # one GPU, a byte-level model of 113M parameters
    python benchmarks/bench_fp8.py --products --curve --error --tiny    # rehearsal on any machine

--products: medians of calls with the L2 cache flushed between them; times below some 60 us are the host's. "Whole layer"
adds up what the linear layers of a decoder layer take, forward and backward.

--curve trains the same model from the same weights on the same text, in bf16 and in FP8, AdamW, ``--steps`` steps of 16 x
1,024 bytes: Python's documentation (``pydoc_data.topics``) and the docstrings of its standard library, which are on every
machine; the last tenth is held out. --error then compares gradients over the weights that bf16 has trained.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import functools
import json
import pydoc_data.topics
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from profile_step import served_memory
from torch import Tensor
from transformers import Qwen3Config

from apollo_tp.config import OptimConfig, OptimizerKind, Precision, Schedule
from apollo_tp.distributed.products import ScaledProduct
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import BoundModel, bind_model, fp8
from apollo_tp.model.batch import PackedBatch, pack
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.optim import Optimizer
from apollo_tp.training.trainer import Trainer
from apollo_tp.wire.commands import Sample

SHAPES = {
    2: {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (12288, 4096), "down": (4096, 6144)},
    1: {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
}
"""Rows and columns of the weights of a decoder layer of the 8.19B model, on one rank of so many."""
TINY_SHAPES = {1: {"qkv": (96, 64), "down": (64, 128)}}
LAYERS = 36
TILES = [((64, 64), 4), ((128, 64), 4), ((64, 128), 4), ((128, 128), 8), ((64, 64), 8)]
MODEL = {
    "vocab_size": 256, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
TINY_MODEL = MODEL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of products: bf16, or FP8 with these constants of ``apollo_tp.model.fp8``."""

    in_fp8: bool = False
    per_row: bool = fp8.PER_ROW
    gradients: torch.dtype = fp8.GRADIENTS

    def choose(self) -> None:
        """From now on, FP8 products are of this kind; nothing is compiled yet."""
        fp8.PER_ROW, fp8.GRADIENTS = self.per_row, self.gradients
        torch._dynamo.reset()


VARIANTS = {"bf16": Variant()} | {
    f"fp8, scales of {'rows' if per_row else 'matrices'}, gradients {name}": Variant(True, per_row, dtype)
    for per_row in (True, False)
    for name, dtype in (("e5m2", torch.float8_e5m2), ("e4m3", torch.float8_e4m3fn))
}


def seconds_of(call: Callable[[], Any]) -> float:
    """The median time of a call, the device's where there is one."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(call, warmup=15, rep=60, return_mode="median")) / 1e3
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def products(rows: int, columns: int, tokens: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of the three products of a weight [rows, columns] with ``tokens`` tokens, by kind."""
    x, w, g = (torch.randn(*s, device=device).bfloat16() for s in ((tokens, columns), (rows, columns), (tokens, rows)))
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "bf16": {"forward": lambda: x @ w.T, "input gradient": lambda: g @ w, "weight gradient": lambda: g.T @ x}
    }
    for per_row in (True, False):
        for name, dtype in (("e4m3", fp8.VALUES), ("e5m2", torch.float8_e5m2)):
            fp8.PER_ROW = per_row
            x8, w8, g8 = fp8.cast([x], fp8.VALUES), fp8.cast([w], fp8.VALUES), fp8.cast([g], dtype)
            for fast in (True, False):
                made = {
                    "forward": ScaledProduct(x8.rows, w8.rows, x8.row_inverse, w8.row_inverse, fast),
                    "input gradient": ScaledProduct(g8.rows, w8.columns, g8.row_inverse, w8.inverse, fast),
                    "weight gradient": ScaledProduct(g8.columns, x8.columns, g8.inverse, x8.inverse, fast),
                }
                kind = f"scales of {'rows' if per_row else 'matrices'}, gradients {name}, {'fast' if fast else 'exact'} sums"
                calls[kind] = {what: product.new for what, product in made.items()}
    fp8.PER_ROW = Variant().per_row
    return {kind: {what: seconds_of(call) for what, call in of.items()} for kind, of in calls.items()}


def casts(shape: tuple[int, int], device: str) -> dict[str, float]:
    """Seconds of the casts of a matrix of this shape, and of what they consist of."""
    m = torch.randn(*shape, device=device).bfloat16()
    of_rows = fp8.largest_of_rows([m])
    rows, one = fp8.scales(of_rows, fp8.VALUES).scale, fp8.scales(of_rows.amax(), fp8.VALUES).scale
    calls: dict[str, Callable[[], Any]] = {
        "largest": lambda: fp8.largest_of_rows([m]),
        "largest and rows, one pass": lambda: fp8.fp8_cast_rows(m, fp8.VALUES),
        "rows": lambda: fp8.fp8_cast([m], one, one, fp8.VALUES, True, False),
        "transpose": lambda: fp8.fp8_cast([m], one, one, fp8.VALUES, False, True),
        "both": lambda: fp8.fp8_cast([m], rows, one, fp8.VALUES, True, True),
        "copy in bf16": m.clone,
    }
    return {what: seconds_of(call) for what, call in calls.items()}


def tiles(shapes: list[tuple[int, int]], device: str) -> dict[str, dict[str, float]]:
    """Seconds of the cast to both layouts and to the transpose by tile."""
    found, before = {}, (fp8.TILE, fp8.WARPS)
    for shape in shapes:
        m = torch.randn(*shape, device=device).bfloat16()
        one = fp8.scales(m.abs().amax(), fp8.VALUES).scale
        for fp8.TILE, fp8.WARPS in TILES:
            found[f"{shape}, tile {fp8.TILE}, {fp8.WARPS} warps"] = {
                what: seconds_of(lambda: fp8.fp8_cast([m], one, one, fp8.VALUES, *layouts))  # noqa: B023
                for what, layouts in (("both", (True, True)), ("transpose", (False, True)))
            }
    fp8.TILE, fp8.WARPS = before
    return found


def layer_ms(rows: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a decoder layer: products by kind, and the casts of ``fp8_linear`` as they are alone."""
    kinds = next(iter(rows.values()))["products"]
    total = {kind: 1e3 * sum(sum(entry["products"][kind].values()) for entry in rows.values()) for kind in kinds}
    needed = {"x": ("largest", "both"), "g": ("largest", "both"), "w": ("largest and rows, one pass", "transpose")}
    spent = (entry["casts"][what][one] for entry in rows.values() for what, ones in needed.items() for one in ones)
    total["casts"] = 1e3 * sum(spent)
    return total


def compare_products(options: argparse.Namespace, device: str) -> dict[str, Any]:
    tokens, all_shapes = (48, TINY_SHAPES) if options.tiny else (4096, SHAPES)
    result: dict[str, Any] = {"tiles": tiles([(48, 64)] if options.tiny else [(4096, 6144), (12288, 4096)], device)}
    show("tiles", result["tiles"])
    for tp, shapes in all_shapes.items():
        rows: dict[str, Any] = {}
        for name, (n, k) in shapes.items():
            of = products(n, k, tokens, device)
            found = {w: casts(s, device) for w, s in (("x", (tokens, k)), ("g", (tokens, n)), ("w", (n, k)))}
            rows[name] = {"products": of, "casts": found}
            for kind, times in of.items():
                rates = {what: f"{2 * tokens * n * k / t / 1e12:.0f}" for what, t in times.items()}
                print(f"TP {tp} {name} ({n} x {k}), TFLOP/s, {kind}: {rates}", flush=True)
            show(f"TP {tp} {name} ({n} x {k}) casts", found)
        result[f"TP {tp}"] = rows | {"whole layer, ms": layer_ms(rows)}
        for kind, ms in result[f"TP {tp}"]["whole layer, ms"].items():
            print(f"TP {tp}, whole layer, {kind}: {ms:.3f} ms, x {LAYERS}: {ms * LAYERS:.1f} ms", flush=True)
    return result


def show(title: str, entries: dict[str, dict[str, float]]) -> None:
    for name, of in entries.items():
        print(f"{title}, {name}: { {what: f'{t * 1e6:.0f} us' for what, t in of.items()} }", flush=True)


@functools.cache
def text() -> bytes:
    """Python's documentation and the docstrings of its standard library, in the order of their files."""
    found = list(pydoc_data.topics.topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "pydoc_data" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files that test the parser
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [doc for node in ast.walk(tree) if isinstance(node, documented) and (doc := ast.get_docstring(node))]
    return "\n\n".join(found).encode()


class Batches:
    """Samples of ``length`` bytes each: of a step by its number, and held-out ones."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length, self.split = count, length, len(text()) * 9 // 10

    def _samples(self, starts: Tensor) -> list[Sample]:
        weights = [0.0] + [1.0] * (self.length - 1)
        return [Sample(list(text()[start : start + self.length]), weights) for start in starts.tolist()]

    def step(self, number: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(number)
        return self._samples(torch.randint(self.split - self.length, (self.count,), generator=generator))

    def held_out(self) -> list[Sample]:
        return self._samples(torch.linspace(self.split, len(text()) - self.length, 4 * self.count).long())


class Run:
    """One training run, from the same weights as the others. ``weights``: of another run, which this one takes over, not
    compiled: for a few gradients."""

    def __init__(self, variant: Variant, options: argparse.Namespace, device: str, weights: Any = None) -> None:
        variant.choose()
        torch.manual_seed(0)
        config, tp = Qwen3Config(**(TINY_MODEL if options.tiny else MODEL)), TPGroup.single()
        self.batches = Batches(2, 64) if options.tiny else Batches(16, 1024)
        self.weights = served_memory(config, device, tp) if weights is None else weights
        self.device, tokens = torch.device(device), self.batches.count * self.batches.length
        self.model: BoundModel = bind_model(
            config, self.weights[0], tp, fused_tensors=self.weights[1], fp8=variant.in_fp8,
            compiled=CompileOptions() if device == "cuda" and weights is None else None,
        )  # fmt: skip
        optim = OptimConfig(
            kind=OptimizerKind.adamw, lr=6e-4, warmup_steps=min(50, options.steps // 2), schedule=Schedule.cosine,
            total_steps=options.steps, max_relative_update=1e9, check_replicas_every=0, betas=(0.9, 0.95),
        )  # fmt: skip
        optimizer = Optimizer(optim, Precision.remainder, self.model.parameters, tp)
        self.trainer = Trainer(self.model, optimizer, tp, device=self.device, max_micro_batch_tokens=tokens)
        self.tokens = tokens

    def train(self, steps: int) -> list[float]:
        """The loss of each step, nats a byte."""
        losses = []
        for number in range(steps):
            result = self.trainer.step(self.batches.step(number))
            assert not result.skipped, result.skipped
            losses.append(result.loss)
        return losses

    def packed(self, samples: list[Sample]) -> list[PackedBatch]:
        return [batch.to(self.device) for batch in pack(samples, self.tokens)]

    @torch.no_grad()
    def held_out_loss(self) -> float:
        batches = self.packed(self.batches.held_out())
        count = sum(float(batch.weights.sum()) for batch in batches)
        return sum(float(self.model.forward_loss(batch).loss) for batch in batches) / count

    def gradients(self) -> dict[str, Tensor]:
        """Of the first held-out samples, by checkpoint tensor, fp32."""
        self.model.forward_loss(self.packed(self.batches.held_out())[0]).loss.backward()
        found = {p.name: p.grad.float().clone() for p in self.model.parameters if p.grad is not None}
        self.model.zero_grad()
        return found


def compare_curves(options: argparse.Namespace, device: str) -> tuple[dict[str, Any], Any]:
    """Losses by kind of products, and the weights that bf16 has trained."""
    result, weights = {}, None
    for name in options.variants or list(VARIANTS):
        run = Run(VARIANTS[name], options, device)
        begun = time.perf_counter()
        losses = run.train(options.steps)
        last = statistics.mean(losses[-20:])
        result[name] = {"losses": losses, "last 20": last, "held out": run.held_out_loss()}
        if name == "bf16":
            weights, parameters = run.weights, sum(p.tensor.numel() for p in run.model.parameters)
            print(f"{parameters / 1e6:.1f}M parameters, {len(text()) / 1e6:.2f} MB of text", flush=True)
        base = result.get("bf16", result[name])
        apart = {key: f"{100 * (result[name][key] / base[key] - 1):+.2f} %" for key in ("last 20", "held out")}
        print(
            f"{options.steps} steps, {name}: last 20 steps {last:.4f} ({apart['last 20']}), held out "
            f"{result[name]['held out']:.4f} ({apart['held out']}), {time.perf_counter() - begun:.0f} s; every tenth: "
            f"{[round(loss, 3) for loss in losses[:: max(1, options.steps // 10)]]}",
            flush=True,
        )
        del run
    return result, weights


def compare_gradients(options: argparse.Namespace, device: str, weights: Any) -> dict[str, Any]:
    """By kind and tensor: the norm of the difference to bf16's gradient by the norm of that."""
    weights = Run(Variant(), options, device).weights if weights is None else weights
    expected, result = Run(Variant(), options, device, weights).gradients(), {}
    for name, variant in VARIANTS.items():
        got = Run(variant, options, device, weights).gradients()
        result[name] = {n: float((got[n] - g).norm() / g.norm()) for n, g in expected.items()}
    owners = sorted({n.split(".", 3)[3] for n in expected if ".layers." in n and "norm" not in n})
    for name, errors in result.items():
        print(f"error of gradients against bf16, {name}:", flush=True)
        for owner in owners:
            row = [f"{e:.3f}" for n, e in errors.items() if n.endswith(owner)]
            print(f"    {owner}, by layer: {' '.join(row)}", flush=True)
        rest = {n: round(e, 3) for n, e in errors.items() if ".layers." not in n}
        print(f"    {rest}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", action="store_true", help="rates of single products and casts")
    parser.add_argument("--curve", action="store_true", help="losses of a small model")
    parser.add_argument("--error", action="store_true", help="errors of gradients, after --curve over its weights")
    parser.add_argument("--steps", type=int, help="of --curve (default 500; tiny 4)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="of --curve, bf16 first (default: all)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    options.steps = options.steps or (4 if options.tiny else 500)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"bench_fp8: {machine}, torch {torch.__version__}, {datetime.date.today()}", flush=True)
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__}
    weights = None
    if options.products:
        result["products"] = compare_products(options, device)
    if options.curve:
        result["curves"], weights = compare_curves(options, device)
    if options.error:
        result["errors of gradients"] = compare_gradients(options, device, weights)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{datetime.date.today()}_fp8.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
