"""torchrun for trainer ranks, with a report of one line instead of tracebacks.

    python -m apollo_tp.launch.torchrun --nproc-per-node 2 [--max-restarts N] [overrides]
    python -m apollo_tp.launch.torchrun --nnodes 2 --node-rank K --master-addr HOST --master-port PORT --nproc-per-node 2 ...

On one host the same as ``torchrun --standalone --local-addr 127.0.0.1 -m apollo_tp.launch``: no name of the host needs to
resolve. On several, torchrun's own options for nodes are passed on. When it is stopped by a signal and all ranks ended
well, its exit status is 0; otherwise it is that of the rank that failed first.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from apollo_tp.launch.arguments import print_answer, read_arguments
from apollo_tp.launch.distributed import LOOPBACK

EXIT_SIGNALLED = 128
ALONE = ("--standalone", "--local-addr", LOOPBACK)
NODE_OPTIONS = (
    "nnodes", "node-rank", "master-addr", "master-port", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf",
    "local-addr",
)  # fmt: skip
"""torchrun's options for several hosts."""


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m apollo_tp.launch.torchrun", allow_abbrev=False, add_help=False)
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default="1")
    parser.add_argument("--max-restarts", "--max_restarts", default="0")
    for option in NODE_OPTIONS:
        parser.add_argument(f"--{option}", f"--{option.replace('-', '_')}")
    known, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print_answer(str(read_arguments(["--help"])))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, which it reports in four lines
    with tempfile.TemporaryDirectory(prefix="apollo_tp-ranks-") as logs:
        return _run(known, rest, Path(logs))


def _run(known: argparse.Namespace, rest: list[str], logs: Path) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = {option: getattr(known, option.replace("-", "_")) for option in NODE_OPTIONS}
    nodes = [f"--{option}={value}" for option, value in given.items() if value is not None]
    options = [
        *(nodes or ALONE), "--log-dir", str(logs), "--nproc-per-node", known.nproc_per_node,
        "--max-restarts", known.max_restarts, "-m", "apollo_tp.launch", *rest,
    ]  # fmt: skip
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as error:
        return _report(error)
    except SignalException:
        return int(any(logs.rglob("error.json")))  # written by a rank that failed
    return 0


def _report(error: Any) -> int:
    """Print the message of the rank that failed first; returns its exit status."""
    rank, failure = error.get_first_failure()
    message = failure.message.get("message") if isinstance(failure.message, dict) else failure.message
    print(f"apollo_tp.launch: rank {rank} failed: {message}", file=sys.stderr, flush=True)
    return failure.exitcode if failure.exitcode > 0 else EXIT_SIGNALLED - failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
