"""FP8 products against bf16 ones: their rates.

    python benchmarks/bench_fp8.py --products                # one GPU, shapes of the 8.19B model at TP = 1 and 2
    python benchmarks/bench_fp8.py --products --tiny         # rehearsal on any machine

Times are medians of calls with the L2 cache flushed between them. "Whole layer" adds up the products and casts of
the linear layers of one decoder layer, forward and backward, as ``apollo_tp.model.fp8`` makes them: largest magnitudes are
found by kernels of their own here, and in compiled layers mostly by those that write the matrix.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apollo_tp.distributed.products import ScaledProduct
from apollo_tp.model import fp8

SHAPES = {
    2: {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (12288, 4096), "down": (4096, 6144)},
    1: {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
}
"""Rows and columns of the weights of a decoder layer of the 8.19B model, on one rank of so many."""
TINY = {1: {"qkv": (96, 64), "down": (64, 128)}}
LAYERS = 36
TILES = [
    ((64, 64), 4),
    ((128, 64), 4),
    ((64, 128), 4),
    ((128, 128), 8),
    ((128, 128), 4),
    ((32, 128), 4),
    ((128, 32), 4),
]
LAYOUTS = {"rows": (True, False), "columns": (False, True), "both": (True, True)}
COMPARED = ((4096, 4096), (4096, 6144), (12288, 4096))
"""Matrices on which tiles of the cast are compared."""


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


def guarded(call: Callable[[], Any]) -> float | str:
    """``seconds_of``, or the first line of the error of what does not run here."""
    try:
        return seconds_of(call)
    except Exception as error:  # noqa: BLE001 - a benchmark of what this machine may not have
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def matrix(rows: int, columns: int, device: str) -> Tensor:
    return torch.randn(rows, columns, device=device).bfloat16()


def values(matrix: Tensor, dtype: torch.dtype, per_row: bool) -> fp8.Cast:
    """Both layouts of ``matrix`` in ``dtype``."""
    of_rows = fp8.scales(fp8.largest_of([matrix], per_row=per_row), dtype)
    of_columns = fp8.scales(fp8.largest_of([matrix], columns=True, per_row=per_row), dtype)
    rows, columns = fp8.fp8_cast([matrix], of_rows.scale, of_columns.scale, dtype, True, True)
    return fp8.Cast(rows, columns, of_rows.inverse, of_columns.inverse)


def products(rows: int, columns: int, tokens: int, device: str) -> dict[str, Any]:
    """Seconds of the three products of a weight [rows, columns] with ``tokens`` tokens, by kind."""
    x, w, g = (matrix(*shape, device) for shape in ((tokens, columns), (rows, columns), (tokens, rows)))
    found: dict[str, Any] = {
        "bf16": {
            "forward": guarded(lambda: x @ w.T),
            "input gradient": guarded(lambda: g @ w),
            "weight gradient": guarded(lambda: g.T @ x),
        }
    }
    for per_row in (False, True):
        x8, w8 = (values(m, fp8.VALUES, per_row) for m in (x, w))
        for name, dtype in (("e4m3", fp8.VALUES), ("e5m2", fp8.GRADIENTS)):
            g8 = values(g, dtype, per_row)
            of: dict[str, Any] = {}
            for fast in (True, False):
                made = {
                    "forward": ScaledProduct(x8.rows, w8.rows, x8.row_inverse, w8.row_inverse, fast),
                    "input gradient": ScaledProduct(g8.rows, w8.columns, g8.row_inverse, w8.column_inverse, fast),
                    "weight gradient": ScaledProduct(
                        g8.columns, x8.columns, g8.column_inverse, x8.column_inverse, fast
                    ),
                }
                for what, product in made.items():
                    of[f"{what}, {'fast' if fast else 'exact sums'}"] = guarded(product.new)
            found[f"{'rowwise' if per_row else 'tensorwise'}, gradients {name}"] = of
    return found


def casts(shape: tuple[int, int], device: str) -> dict[str, Any]:
    """Seconds of largest magnitudes, and of casts by the Triton kernel, of a matrix of this shape."""
    m, found = matrix(*shape, device), {}
    for per_row in (False, True):
        kind = "rowwise" if per_row else "tensorwise"
        scales = []
        for columns, of in ((False, "largest of rows"), (True, "largest of columns")):

            def largest(columns: bool = columns, per_row: bool = per_row) -> Tensor:
                return fp8.largest_of([m], columns=columns, per_row=per_row)

            found[f"{kind}, {of}"] = guarded(largest)
            scales.append(fp8.scales(largest(), fp8.VALUES).scale)
        for what, layouts in LAYOUTS.items():
            found[f"{kind}, cast to {what}"] = guarded(
                lambda: fp8.fp8_cast([m], *scales, fp8.VALUES, *layouts)  # noqa: B023
            )
    found["copy in bf16"] = guarded(m.clone)
    return found


def compiled_cast(rows: bool, columns: bool, device: str) -> Callable[[Tensor, Tensor], Any]:
    """The tensorwise cast in plain torch, compiled."""

    def cast(m: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
        out = (m.float() * scale).clamp(-448, 448).to(fp8.VALUES)
        return out if rows else None, out.t().contiguous() if columns else None

    return torch.compile(cast, dynamic=False) if device == "cuda" else cast


def tiles(device: str, shapes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Seconds of the tensorwise cast by tile, by torch.compile, and of what only reads and writes as much."""
    found, before = {}, (fp8.TILE, fp8.WARPS)
    for shape in shapes:
        m = matrix(*shape, device)
        scale = fp8.scales(fp8.largest_of([m], per_row=False), fp8.VALUES).scale
        for tile, warps in TILES:
            fp8.TILE, fp8.WARPS = tile, warps
            found[f"{shape}, tile {tile}, {warps} warps"] = {
                what: guarded(lambda: fp8.fp8_cast([m], scale, scale, fp8.VALUES, *layouts))  # noqa: B023
                for what, layouts in LAYOUTS.items()
            }
        fp8.TILE, fp8.WARPS = before
        found[f"{shape}, compiled"] = {}
        for what, layouts in LAYOUTS.items():
            compiled = compiled_cast(*layouts, device)
            found[f"{shape}, compiled"][what] = guarded(lambda: compiled(m, scale))  # noqa: B023
        found[f"{shape}, largest"] = {
            "of the matrix": guarded(lambda: fp8.largest_of([m], per_row=False)),  # noqa: B023
            "of the matrix, compiled": guarded(lambda: compiled_largest(m, device)),  # noqa: B023
        }
    return found


@functools.cache
def _compiled_largest() -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda m: fp8.largest_of([m], per_row=False), dynamic=False)


def compiled_largest(m: Tensor, device: str) -> Tensor:
    return _compiled_largest()(m) if device == "cuda" else fp8.largest_of([m], per_row=False)


def whole_layer(rows: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a decoder layer's products and casts, by kind; casts are those of ``casts`` for each matrix."""
    total: dict[str, float] = {}
    for entry in rows.values():
        for kind, of in entry["products"].items():
            if any(isinstance(t, str) for t in of.values()):
                continue
            chosen = {
                name: t
                for name, t in of.items()
                if kind == "bf16" or name.endswith("fast" if name.startswith("forward") else "exact sums")
            }
            total[f"{kind}: products"] = total.get(f"{kind}: products", 0) + 1e3 * sum(chosen.values())
        for kind in ("tensorwise", "rowwise"):
            times = []
            for what, layouts in (("x", ("both",)), ("g", ("both",)), ("w", ("rows", "columns"))):
                of = entry["casts"][what]
                times += [of[f"{kind}, cast to {one}"] for one in layouts] + [of[f"{kind}, largest of rows"]]
                times += [of["rowwise, largest of columns"]] if kind == "rowwise" else []
            spent = sum(t if isinstance(t, float) else float("nan") for t in times)
            total[f"{kind}: casts"] = total.get(f"{kind}: casts", 0) + 1e3 * spent
    return total | {f"{name}, x {LAYERS}": ms * LAYERS for name, ms in total.items()}


def agrees(device: str) -> dict[str, Any]:
    """Whether the fused cast has the bits of the one by torch, and how far products are from exact ones, by kind."""
    m, other = matrix(300, 208, device), matrix(96, 208, device)
    m[0, 0], found = 1000.0, {}
    for per_row in (False, True):
        for dtype in (fp8.VALUES, fp8.GRADIENTS):
            fused = values(m, dtype, per_row)
            fp8.FUSED_CAST = False
            plain, second = values(m, dtype, per_row), values(other, fp8.VALUES, per_row)
            fp8.FUSED_CAST = True
            same = all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(fused[:2], plain[:2], strict=True)
            )
            product = ScaledProduct(fused.rows, second.rows, fused.row_inverse, second.row_inverse, False).new().float()
            exact = m.float() @ other.float().T
            error = float((product - exact).norm() / exact.norm())
            found[f"{'rowwise' if per_row else 'tensorwise'}, {dtype}"] = {
                "same bits": same,
                "error of a product": error,
            }
    return found


def compare_products(options: argparse.Namespace, device: str) -> dict[str, Any]:
    tokens = 48 if options.tiny else 4096
    print(checked := agrees(device), flush=True)
    result: dict[str, Any] = {"checked": checked, "tiles": tiles(device, ((48, 64),) if options.tiny else COMPARED)}
    show("tiles", result["tiles"])
    for tp, shapes in (TINY if options.tiny else SHAPES).items():
        rows: dict[str, Any] = {}
        for name, (n, k) in shapes.items():
            flops = 2 * tokens * n * k
            entry: dict[str, Any] = {"products": products(n, k, tokens, device)}
            entry["casts"] = {w: casts(s, device) for w, s in (("x", (tokens, k)), ("g", (tokens, n)), ("w", (n, k)))}
            rows[name] = entry
            for kind, of in entry["products"].items():
                rates = {what: t if isinstance(t, str) else f"{flops / t / 1e12:.0f}" for what, t in of.items()}
                print(f"TP {tp} {name} ({n} x {k}), TFLOP/s, {kind}: {rates}", flush=True)
            show(f"TP {tp} {name} ({n} x {k}) casts", entry["casts"])
        result[f"TP {tp}"] = rows | {"whole layer, ms": whole_layer(rows)}
        for name, ms in result[f"TP {tp}"]["whole layer, ms"].items():
            print(f"TP {tp} whole layer, ms: {name}: {ms:.3f}", flush=True)
    return result


def show(title: str, entries: dict[str, Any]) -> None:
    """One line an entry, in microseconds."""
    for name, of in entries.items():
        cells = {what: t if isinstance(t, str) else f"{t * 1e6:.0f} us" for what, t in of.items()}
        print(f"{title}, {name}: {cells}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", action="store_true", help="rates of single products and casts")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"bench_fp8: {machine}, torch {torch.__version__}, {datetime.date.today()}", flush=True)
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__}
    if options.products:
        result["products"] = compare_products(options, device)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{datetime.date.today()}_fp8.json"
        path.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
