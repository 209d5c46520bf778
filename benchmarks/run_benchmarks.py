"""Some benchmarks one after the other, on one vLLM server where they want the same one.

    python benchmarks/run_benchmarks.py "step --cases 1x" "latency --cases idle,time-slicing" hogwild --out results
    python benchmarks/run_benchmarks.py "step --tiny --cases 1x" "latency --tiny --tp 2 --cases idle" --seconds 300

Each benchmark gets --server-args and --out behind its own options, and --seconds of time; one that fails or overruns does
not take the others along. hogwild comes last: it leaves a NaN in the served weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator

from server_stack import note, sharing_a_server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "benchmarks", nargs="+", metavar="'NAME OPTIONS'", help="bench_NAME.py, with options of its own"
    )
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument(
        "--seconds", type=int, default=600, help="longest time of one benchmark, a server's start included"
    )
    parser.add_argument("--out", help="folder for the results")
    options = parser.parse_args()
    failed = False
    with sharing_a_server():
        for benchmark in options.benchmarks:
            name, *words = shlex.split(benchmark)
            words += [f"--server-args={options.server_args}", *(["--out", options.out] if options.out else [])]
            begun = time.monotonic()
            status = run(f"bench_{name}", words, options.seconds)
            note(f"== {benchmark}: {status}, {time.monotonic() - begun:.0f} s")
            failed |= status != "ok"
    return int(failed)


def run(module: str, words: list[str], seconds: int) -> str:
    """ "ok", or how it failed."""
    sys.argv = [f"benchmarks/{module}.py", *words]
    try:
        with time_limit(seconds):
            status = importlib.import_module(module).main()
    except Exception as error:  # noqa: BLE001 - the edge: what happens to one benchmark is told, and the next begins
        traceback.print_exc()
        return f"failed: {type(error).__name__}"
    return f"failed: exit status {status}" if status else "ok"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after ``seconds``, wherever the main thread is."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    sys.exit(main())
