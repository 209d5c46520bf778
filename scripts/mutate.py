"""Mutation testing: change one line of the package at a time, and see whether the tests that should notice it fail.

``python scripts/mutate.py`` applies each mutation of tests/mutations.toml to a copy of the checkout and runs the tests that
it names, until the first failure. The outcome of each is kept in benchmarks/results/mutations.json, where it replaces that
of an earlier run. At the end the tests that failed are run without mutations, and must pass. The exit status is 1 if a
mutation does not apply (its text must occur exactly once), if its tests could not be run, or if the one that failed also
fails without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path("tests/mutations.toml")
RESULTS = Path("benchmarks/results/mutations.json")
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
DOES_NOT_APPLY, NOT_RUN, BROKEN, FAILS_ANYWAY = "does not apply", "not run", "tests not run", "fails without it too"
PASSED, FAILED = 0, 1
"""Exit statuses of pytest; others mean that it could not run the tests."""
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.*?)(?: - |$)", re.MULTILINE)
"""A line of pytest's summary; an id may contain blanks."""


@dataclass(frozen=True)
class Mutation:
    """``before``, which occurs once in ``file``, becomes ``after``; one of ``tests`` (arguments of pytest) must fail."""

    id: str
    area: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a mutation. ``test``: the one that failed, or why there is none."""

    id: str
    area: str
    outcome: str
    test: str = ""
    seconds: int = 0
    commit: str = ""
    date: str = ""


def read_list(path: Path) -> list[Mutation]:
    """The mutations of a list. Raises ValueError if two have one id, TypeError for an unknown or a missing field."""
    entries = tomllib.loads(path.read_text())["mutation"]
    mutations = [Mutation(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]
    if repeated := [name for name, count in Counter(m.id for m in mutations).items() if count > 1]:
        raise ValueError(f"{path}: got {repeated} more than once, expected ids that differ")
    return mutations


def copy_checkout(target: Path) -> None:
    """Copy all files that git tracks, or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


@contextlib.contextmanager
def applied(mutation: Mutation, copy: Path) -> Iterator[bool]:
    """Within the context the file is mutated. Yields False, and changes nothing, if the text does not occur exactly once."""
    path = copy / mutation.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutation.before) != 1:
        yield False
        return
    _write(path, text.replace(mutation.before, mutation.after))
    try:
        yield True
    finally:
        _write(path, text)


def _write(path: Path, text: str) -> None:
    """Compiled files of the same second and size would be taken for current: they go."""
    path.write_text(text)
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


def run_tests(copy: Path, seconds: float, *tests: str) -> tuple[int | None, str]:
    """Exit status and output of pytest in the copy; the status is None if it took longer than ``seconds``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={copy}.t", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read()


def judge(mutation: Mutation, copy: Path, seconds: float, left: float) -> Outcome:
    """Run the tests of one mutation, for at most ``seconds``; with less ``left`` they may be cut short."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    started, date = time.monotonic(), time.strftime("%Y-%m-%d")

    def outcome(kind: str, test: str = "") -> Outcome:
        elapsed = round(time.monotonic() - started)
        return Outcome(mutation.id, mutation.area, kind, test, elapsed, commit.stdout.strip(), date)

    if left <= 0:
        return outcome(NOT_RUN, "the time was over")
    with applied(mutation, copy) as fits:
        if not fits:
            return outcome(DOES_NOT_APPLY, f"its text does not occur exactly once in {mutation.file}")
        status, output = run_tests(copy, min(seconds, left), "-x", *mutation.tests)
    if status is None:
        return outcome(TIMED_OUT) if seconds <= left else outcome(NOT_RUN, "the time was over")
    if status == PASSED:
        return outcome(SURVIVED)
    failed = FAILURE.search(output)
    if status == FAILED and failed:
        return outcome(KILLED, failed[1])
    print(output[-3000:])
    return outcome(BROKEN, f"pytest ended with status {status}")


def judge_all(mutations: Sequence[Mutation], jobs: int, seconds: float, total: float) -> list[Outcome]:
    """Outcomes in the order of ``mutations``; ``jobs`` at a time, each in a copy of its own."""
    deadline = time.monotonic() + total
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def one(mutation: Mutation) -> Outcome:
        copy = copies.get()
        found = judge(mutation, copy, seconds, deadline - time.monotonic())
        copies.put(copy)
        print(f"{found.id}: {found.outcome} in {found.seconds} s {found.test}", flush=True)
        return found

    with tempfile.TemporaryDirectory(prefix="mutate-") as folder, ThreadPoolExecutor(jobs) as pool:
        for number in range(jobs):
            copies.put(Path(folder, str(number)))
            copy_checkout(Path(folder, str(number)))
        outcomes = list(pool.map(one, mutations))
        return without_mutation(outcomes, copies.get(), max(seconds, total))


def without_mutation(outcomes: Sequence[Outcome], copy: Path, seconds: float) -> list[Outcome]:
    """The outcomes, except for those of tests that fail in the unchanged ``copy`` too."""
    killers = sorted({found.test for found in outcomes if found.outcome == KILLED})
    status, output = run_tests(copy, seconds, *killers) if killers else (PASSED, "")
    if status == PASSED:
        return list(outcomes)
    print(output[-3000:])
    failing = FAILURE.findall(output) if status == FAILED else killers
    return [replace(found, outcome=FAILS_ANYWAY) if found.test in failing else found for found in outcomes]


def merge(outcomes: Sequence[Outcome], mutations: Sequence[Mutation], path: Path) -> list[Outcome]:
    """All known outcomes of the listed mutations, with these in place of older ones; written to ``path``, one a line."""
    known = {row["id"]: Outcome(**row) for row in json.loads(path.read_text())} if path.exists() else {}
    known |= {found.id: found for found in outcomes if found.outcome != NOT_RUN}
    rows = [known[m.id] for m in mutations if m.id in known]
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    return rows


def rates(outcomes: Sequence[Outcome], mutations: Sequence[Mutation]) -> str:
    """A table in Markdown: how many mutations of each area were noticed, and how many were run and listed."""
    lines = ["| area | killed | run | listed |", "|---|---|---|---|"]
    for area in [*dict.fromkeys(m.area for m in mutations), "all"]:
        listed = sum(area in (m.area, "all") for m in mutations)
        found = [row.outcome for row in outcomes if area in (row.area, "all")]
        lines.append(f"| {area} | {found.count(KILLED)} | {len(found)} | {listed} |")
    left = [f"{row.id}: {row.outcome} {row.test}".strip() for row in outcomes if row.outcome != KILLED]
    return "\n".join([*lines, "", *left])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", action="append", help="only mutations of this area; may be repeated")
    parser.add_argument("--only", action="append", metavar="ID", help="only this mutation; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N mutations")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit for each mutation (default: 300)")
    parser.add_argument(
        "--total",
        type=float,
        default=3600.0,
        help="limit for all together (default: 3600), and for the run without mutations at the end",
    )
    options = parser.parse_args(arguments)
    mutations = read_list(ROOT / LIST)
    chosen = [m for m in mutations if m.area in (options.area or [m.area]) and m.id in (options.only or [m.id])][
        : options.limit
    ]
    if not chosen:
        sys.exit(f"got no such mutation, expected one of {LIST}; its areas are {sorted({m.area for m in mutations})}")
    outcomes = judge_all(chosen, options.jobs, options.seconds, options.total)
    print("", rates(merge(outcomes, mutations, ROOT / RESULTS), mutations), sep="\n")
    return any(found.outcome in (DOES_NOT_APPLY, BROKEN, FAILS_ANYWAY) for found in outcomes)


if __name__ == "__main__":
    sys.exit(main())
