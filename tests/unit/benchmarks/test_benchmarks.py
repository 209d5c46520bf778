"""What the benchmarks compute before anything runs, and from what they measured."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.fakes import wait_for


@pytest.fixture(scope="module")
def bench_step() -> ModuleType:
    return _benchmark("bench_step")


@pytest.fixture(scope="module")
def bench_scale() -> ModuleType:
    return _benchmark("bench_scale")


@pytest.fixture(scope="module")
def on_gpus() -> ModuleType:
    return _benchmark("on_gpus")


def _benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
        __import__(name)
    return sys.modules[name]


def test_cases_share_trainers_and_smaller_steps_come_first(bench_step: ModuleType) -> None:
    """A trainer's peak memory is that of its life so far: a small step after a large one would report the large one's."""
    assert bench_step.by_trainer(list(bench_step.CASES)[::-1]) == [
        ["1x-fp8"],
        ["1x", "4x"],
        ["1x-stochastic-fp8"],
        ["1x-stochastic"],
        ["1x-recompute", "4x-recompute"],
    ]
    assert bench_step.by_trainer(["fsdp2-1x"]) == []


@pytest.mark.parametrize(("ranks", "expected"), [(1, (1, 4)), (2, (1, 2)), (8, (1, 1))])
def test_a_rank_of_the_baseline_takes_whole_sequences(
    bench_step: ModuleType, ranks: int, expected: tuple[int, int]
) -> None:
    cases = bench_step.CASES
    assert tuple(cases[n].sequences_per_rank(ranks) for n in ("fsdp2-1x", "fsdp2-4x-recompute")) == expected


def test_a_failed_baseline_says_why(bench_step: ModuleType) -> None:
    output = (
        "[rank1]: Traceback (most recent call last):\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB.\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    )
    assert bench_step.failure(output) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB."
    assert bench_step.failure("") == "no result"


def test_tokens_per_second_of_the_baseline_are_those_of_all_ranks() -> None:
    baseline = _benchmark("baseline_fsdp2")
    options = baseline.argparse.Namespace(sequences=2, tokens=100)
    rank = {"step_seconds": 1.0, "weight_bytes": 6e9, "peak_memory_bytes": 9e9, "loss": 1.0}
    row = baseline.report([rank, rank | {"step_seconds": 2.0, "loss": 3.0}], 10**9, options)
    assert (row["tokens_per_step"], row["tokens_per_rank"], row["tokens_per_second"]) == (400, 200, 200)
    assert (row["step_seconds"], row["tflops_per_gpu"], row["loss"]) == (2.0, pytest.approx(0.6), 2.0)


def test_memory_rows_add_up(bench_scale: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scale, "device_bytes", lambda: 1000)
    state = {"projected moments": 10, "remainders": 50}
    rows = bench_scale.memory_rows(100, state, "stored", 200, (5, 125, 335))
    assert rows["gradients kept"] == 100
    assert rows["activations and workspace at the peak"] == 200 - 60 - 100
    assert rows["vLLM's KV cache, graphs and contexts"] == 20
    assert rows["trainer on the device, with its context"] == 210
    early = bench_scale.memory_rows(100, state, "in_backward", 200, (None, None, None))
    assert (early["gradients kept"], early["activations and workspace at the peak"]) == (0, 140)
    assert early["in use on the device"] is None


def _run_steps(
    on_gpus: ModuleType, patch: pytest.MonkeyPatch, out: Path, steps: dict[str, tuple[str, float]], *arguments: str
) -> int:
    """``steps``: source to run, and the limit in seconds."""
    made = {name: on_gpus.Step(("-c", source), seconds, server=False) for name, (source, seconds) in steps.items()}
    patch.setattr(on_gpus, "STEPS", made)
    patch.setattr("sys.argv", ["on_gpus.py", "--only", *steps, "--out", str(out), *arguments])
    return int(on_gpus.main())


def test_steps_on_gpus_end_in_time_and_run_once(
    on_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that overruns is asked to end and may still say something; one that fails runs again, one that succeeds not."""
    slow = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('the log')); time.sleep(100)"
    steps = {"slow": (slow, 3), "bad": ("raise SystemExit(3)", 20), "good": ("print('ran')", 20)}
    assert _run_steps(on_gpus, monkeypatch, tmp_path, steps) == 1
    told = capfd.readouterr().out
    for part in ("== slow: failed: not done in 3 s", "the log", "== bad: failed: exit status 3", "== good: ok"):
        assert part in told
    assert _run_steps(on_gpus, monkeypatch, tmp_path, {"good": steps["good"]}) == 0
    assert "done before" in capfd.readouterr().out


def test_a_step_that_may_not_fit_is_left_out(
    on_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = {"long": ("print('ran')", 500.0)}
    assert _run_steps(on_gpus, monkeypatch, tmp_path, steps, "--seconds", "300") == 0
    told = capfd.readouterr().out
    assert "left out: may need 500 s" in told
    assert "== long" not in told


def test_what_a_benchmark_started_ends_with_it(tmp_path: Path) -> None:
    """``timeout`` sends SIGTERM to its child and then to the group: the second one must not end the clearing up."""
    pid = tmp_path / "pid"
    script = f"""
import pathlib, signal, sys, time
import server_stack as stack
from tests.support.processes import ManagedProcess
signal.signal(signal.SIGTERM, stack._leave)
slow = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: time.sleep(1) or exit(0)); time.sleep(100)"
process = ManagedProcess([sys.executable, "-c", slow], {{}}, pathlib.Path({str(tmp_path / "log")!r}))
try:
    pathlib.Path({str(pid)!r}).write_text(str(process.process.pid))
    time.sleep(100)
finally:
    process.stop()
    print("stopped")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "benchmarks")}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: pid.exists() and pid.read_text(), 60, "the start of what the benchmark starts")
        process.send_signal(signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "stopped\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_benchmarks_in_one_process_share_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same one as long as it lives; another one after it has ended, and never two at once."""
    stack = _benchmark("server_stack")
    started: list[SimpleNamespace] = []

    @contextlib.contextmanager
    def server(folder: Path, *_: object) -> Iterator[object]:
        assert not any(one.process.process.poll() is None for one in started), "two servers at once"
        process = subprocess.Popen(["sleep", "100"])
        started.append(SimpleNamespace(process=SimpleNamespace(process=process)))
        yield started[-1]
        process.kill()
        process.wait()

    monkeypatch.setattr(stack, "_server", server)
    monkeypatch.setattr(stack.signal, "signal", lambda *_: None)  # this process is pytest's

    def serve(config: dict[str, int]) -> object:
        with stack.serving(tmp_path, config, tp=1) as served:
            return served

    with stack.sharing_a_server():
        first = serve({"layers": 1})
        assert serve({"layers": 1}) is first
        second = serve({"layers": 2})
        assert second is not first
        second.process.process.kill()
        second.process.process.wait()
        assert serve({"layers": 2}) is not second
    assert all(one.process.process.poll() is not None for one in started)
    assert serve({"layers": 2}) is not serve({"layers": 2}), "each has its own outside"
