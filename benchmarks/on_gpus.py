"""Everything that needs GPUs, one after the other, each under a time limit; one table at the end.

    python benchmarks/on_gpus.py --out out/gpus                      # all steps, on two GPUs
    python benchmarks/on_gpus.py --only sums optimizer step          # some
    python benchmarks/on_gpus.py --seconds 550 --out out/gpus        # what fits; the rest is left for the next run
    python benchmarks/on_gpus.py --rehearse --only step              # a tiny model, on any machine

A step that has succeeded in the same ``--out`` is not run again. Each step's output is in ``--out``, with its JSON. A step
that overruns its limit is asked to end, upon which it stops what it started (benchmarks show the logs), then killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

GRACE_SECONDS = 45
"""Between the request to end and SIGKILL: two processes are stopped in it, for up to 20 s each."""
MPS = "MPS idle,MPS,MPS 75 % low,MPS 50 % low,MPS 25 % low,MPS 50 %"

FP8_VARIANTS = ("bf16", "fp8, scales of rows, gradients e5m2", "fp8, scales of rows, gradients e4m3")


@dataclass(frozen=True)
class Step:
    """A command (words; the interpreter is put before them) and its time limit. ``server`` says that it starts vLLM, so that
    --server-args are for it; ``rehearsal`` is put behind the words in a rehearsal, None if there is none."""

    words: tuple[str, ...]
    seconds: float
    server: bool = True
    rehearsal: tuple[str, ...] | None = ("--tiny",)


def bench(name: str, *words: str) -> tuple[str, ...]:
    return (f"benchmarks/bench_{name}.py", *words)


def bench_several() -> tuple[str, ...]:
    """On one server: the other steps, what training costs a client, updates without a pause."""
    latency = "latency --cases 'idle,time-slicing,pace 0.5' --seconds 4"
    steps = "step --cases 4x 1x-recompute 4x-recompute"
    return ("benchmarks/run_benchmarks.py", steps, latency, "hogwild", "--seconds", "480", "--out", "{out}")


def profile_fp8(*words: str) -> tuple[str, ...]:
    """Both ranks, FP8 products."""
    return ("-m", "torch.distributed.run", "--nproc-per-node", "2", "benchmarks/profile_step.py", "--matmul", "fp8",
            "--precision", "stochastic", "--kernels", "45", "--out", "{out}", *words)  # fmt: skip


def pytest(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-s", *words)


STEPS = {
    "kernels": Step(pytest("tests/unit/optim/test_kernels.py"), 120, server=False, rehearsal=None),
    "sums": Step(pytest("tests/gpu/test_peer_memory.py"), 100, server=False, rehearsal=None),
    "products": Step(
        pytest("tests/gpu/test_product_check.py", "tests/gpu/test_sm_limit.py"), 180, server=False, rehearsal=None
    ),
    "replicas": Step(pytest("tests/gpu/test_replicas.py"), 200, server=False, rehearsal=None),
    "shares": Step(bench("shares", "--out", "{out}"), 300, server=False),
    "graphs": Step(pytest("tests/gpu/test_cuda_graphs.py"), 300, server=False, rehearsal=None),
    "gdn": Step(pytest("tests/gpu/test_gated_delta_net.py"), 400, server=False, rehearsal=None),
    "memory": Step(pytest("tests/gpu/test_memory_plan.py"), 300, server=False, rehearsal=None),
    "profile": Step(
        ("-m", "torch.distributed.run", "--nproc-per-node", "2", "benchmarks/profile_step.py", "--kernels", "45"),
        150, server=False,
    ),
    "profile-replicas": Step(
        ("-m", "torch.distributed.run", "--nproc-per-node", "2", "benchmarks/profile_step.py", "--replicas", "2",
         "--kernels", "45"),
        150, server=False,
    ),
    "fp8-casts": Step(pytest("tests/unit/model/test_fp8.py"), 120, server=False, rehearsal=None),
    "fp8-products": Step(bench("fp8", "--products", "--out", "{out}/products"), 240, server=False),
    "fp8-curve": Step(
        bench("fp8", "--curve", "--error", "--variants", *FP8_VARIANTS, "--out", "{out}/curve"), 560, server=False,
    ),
    "fp8-profile": Step(profile_fp8(), 150, server=False),
    "fp8-profile-e4m3": Step(profile_fp8("--fp8", "GRADIENTS=float8_e4m3fn", "FAST_GRADIENTS=True"), 150, server=False),
    "fp8-profile-tensor": Step(profile_fp8("--fp8", "PER_ROW=False"), 150, server=False),
    "fp8-profile-keep": Step(profile_fp8("--fp8", "KEEP_ROW_INPUTS=True"), 150, server=False),
    "fp8-profile-torch": Step(profile_fp8("--fp8", "FUSED_CAST=False"), 150, server=False),
    "fp8-step": Step(
        bench("step", "--cases", "1x-stochastic", "1x-fp8", "1x-stochastic-fp8", "fsdp2-1x-compiled", "fsdp2-1x-fp8",
              "fsdp2-1x-fp8-gather", "--out", "{out}/fp8"),
        580,
    ),
    "fp8-step-tp1": Step(
        bench("step", "--tp", "1", "--cases", "1x-stochastic", "1x-stochastic-fp8", "--out", "{out}/fp8-tp1"), 400
    ),
    "fp8-compare": Step(bench("compare", "--overrides", "train.matmul=fp8", "--out", "{out}/fp8"), 300),
    "optimizer": Step(bench("optimizer", "--steps", "40", "--out", "{out}/optimizer.md"), 110, server=False, rehearsal=()),
    "restore": Step(
        ("-m", "torch.distributed.run", "--nproc-per-node", "2", *bench("restore", "--out", "{out}")), 300, server=False
    ),
    "step": Step(bench("step", "--cases", "1x", "1x-stochastic", "fsdp2-1x-compiled", "--out", "{out}"), 480),
    "baselines": Step(bench("step", "--cases", "fsdp2-1x", "fsdp2-4x-recompute", "--out", "{out}/rest"), 330),
    "replicas-speed": Step(bench("replicas", "--out", "{out}"), 560),
    "online": Step(bench("online", "--out", "{out}"), 500),
    "aborts": Step(pytest("tests/gpu/test_aborted_collectives.py"), 200, server=False, rehearsal=None),
    "shared": Step(bench_several(), 1000, rehearsal=None),
    "scale": Step(bench("scale", "--tp", "1", "2", "--out", "{out}"), 450, rehearsal=None),
    "27B": Step(
        bench("scale", "--model", "qwen3.5-27b", "--tp", "2", "--steps", "4", "--untuned", "--out", "{out}"),
        540, rehearsal=None,
    ),
    "map": Step(bench("map", "--out", "{out}"), 300),
    "compare": Step(bench("compare", "--out", "{out}"), 300),
    "latency-mps": Step(bench("latency", "--cases", MPS, "--seconds", "4", "--out", "{out}/mps"), 500),
    "ipc": Step(pytest("tests/gpu/test_cuda_ipc.py"), 600, server=False, rehearsal=None),
    "refusals": Step(pytest("tests/gpu/test_faults.py", "-k", "refused"), 600, server=False, rehearsal=None),
    "faults": Step(pytest("tests/gpu/test_faults.py", "-k", "not refused and TP1"), 600, server=False, rehearsal=None),
    "faults-tp2": Step(pytest("tests/gpu/test_faults.py", "-k", "not refused and TP2"), 900, server=False, rehearsal=None),
    "failures": Step(pytest("tests/gpu/test_rank_failures.py"), 600, server=False, rehearsal=None),
    "demo": Step(pytest("tests/gpu/test_demo.py"), 400, server=False, rehearsal=None),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time for all; a step that may need more waits"
    )
    parser.add_argument("--server-args", default="", help="further options of the vLLM servers, in one string")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/gpus"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, rows = time.monotonic() + options.seconds, []
    for name in options.only:
        step = STEPS[name]
        done = options.out / f"{name}.done"
        if done.exists():
            rows.append((name, "done before", 0.0))
        elif options.rehearse and step.rehearsal is None:
            rows.append((name, "no rehearsal", 0.0))
        elif time.monotonic() + step.seconds + GRACE_SECONDS > deadline:
            rows.append((name, f"left out: may need {step.seconds:.0f} s", 0.0))
        else:
            begun = time.monotonic()
            status = run(name, step, options)
            rows.append((name, status, time.monotonic() - begun))
            if status == "ok":
                done.touch()
    report(rows)
    return int(any(status.startswith("failed") for _, status, _ in rows))


def run(name: str, step: Step, options: argparse.Namespace) -> str:
    """The end of its output goes to ours, all of it to a file."""
    words = [sys.executable, *(word.replace("{out}", str(options.out)) for word in step.words)]
    words += step.rehearsal if options.rehearse and step.rehearsal else ()
    if step.server and options.server_args:
        words += ["--server-args", options.server_args]
    environment = os.environ | {"APOLLO_TP_TEST_SERVER_ARGS": options.server_args, "PYTHONUNBUFFERED": "1"}
    log = options.out / f"{name}.txt"
    with log.open("w") as output:
        print(shlex.join(words), file=output, flush=True)
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        # pytest tears its fixtures down upon SIGINT alone
        status = wait(process, step.seconds, signal.SIGINT if "pytest" in words else signal.SIGTERM)
    print(f"== {name}: {status}", *log.read_text(errors="replace").splitlines()[-60:], sep="\n", flush=True)
    return status


def wait(process: subprocess.Popen[bytes], seconds: float, end: int) -> str:
    """ "ok", or how it failed; nothing of it is left running."""
    try:
        code = process.wait(seconds)
        return "ok" if code == 0 else f"failed: exit status {code}"
    except subprocess.TimeoutExpired:
        process.send_signal(end)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        return f"failed: not done in {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def report(rows: list[tuple[str, str, float]]) -> None:
    table = Table(title="on_gpus")
    for column in ("step", "result", "s"):
        table.add_column(column)
    for name, status, seconds in rows:
        table.add_row(name, status, f"{seconds:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
