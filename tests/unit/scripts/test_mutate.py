"""scripts/mutate.py over a small checkout of its own, and the list of mutations that it reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import time

def double(x):
    return 2 * x

def unused(x):
    return 3 * x

def rest():
    time.sleep(0)
"""
TESTS = """
from code_of_mine import double, rest

def test_double():
    assert double(2) == 4

def test_rest():
    rest()
"""
MUTATIONS = {
    "A1": ("2 * x", "2 + x"),  # not seen at 2, where both are 4
    "A2": ("2 * x", "4 * x"),
    "B1": ("3 * x", "5 * x"),
    "B2": ("5 * x", "6 * x"),
    "B3": ("sleep(0)", "sleep(60)"),
    "B4": ("def double", "def treble"),
    "B5": ("* x", "+ x"),
}
BESIDES = """
[[mutation]]
id = "C1"
area = "C"
file = "code_of_mine.py"
before = "3 * x"
after = "5 * x"
tests = ["tests/test_rest.py"]
"""
OUTCOMES = {
    "A1": "survived", "A2": "killed", "B1": "survived", "B2": "does not apply", "B3": "timed out",
    "B4": "tests not run", "B5": "does not apply",
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the script, a module, its tests, and a list of mutations."""
    for folder in ("scripts", "tests", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "mutate.py", tmp_path / "scripts")
    (tmp_path / "code_of_mine.py").write_text(CODE)
    (tmp_path / "tests" / "test_code.py").write_text(TESTS)
    entries = [
        f'[[mutation]]\nid = "{name}"\narea = "{name[0]}"\nfile = "code_of_mine.py"\nbefore = "{before}"\n'
        f'after = "{after}"\ntests = ["tests/test_code.py"]\n'
        for name, (before, after) in MUTATIONS.items()
    ]
    (tmp_path / "tests" / "mutations.toml").write_text("\n".join(entries))
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/mutate.py", *arguments]
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=checkout, env=quick, capture_output=True, text=True, timeout=120)


def outcomes(checkout: Path) -> dict[str, str]:
    rows = json.loads((checkout / "benchmarks" / "results" / "mutations.json").read_text())
    return {row["id"]: row["outcome"] for row in rows}


def test_each_mutation_is_judged_by_its_tests(checkout: Path) -> None:
    """A mutation that does not apply, or whose tests cannot be run, fails the command. The checkout stays as it is."""
    done = run(checkout, "--jobs", "2", "--seconds", "10")
    assert done.returncode == 1, done.stderr
    assert outcomes(checkout) == OUTCOMES
    assert "A2: killed in" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert table[1:] == ["| A | 1 | 2 | 2 |", "| B | 0 | 5 | 5 |", "| all | 1 | 7 | 7 |"]
    assert (checkout / "code_of_mine.py").read_text() == CODE


def test_a_part_of_the_list_adds_to_what_is_known(checkout: Path) -> None:
    assert run(checkout, "--area", "A", "--limit", "1").returncode == 0
    assert outcomes(checkout) == {"A1": "survived"}
    done = run(checkout, "--only", "A2")
    assert done.returncode == 0, done.stdout
    assert outcomes(checkout) == {"A1": "survived", "A2": "killed"}
    assert "| all | 1 | 2 | 7 |" in done.stdout
    assert "expected one of tests/mutations.toml" in run(checkout, "--only", "none").stderr
    late = run(checkout, "--only", "B1", "--total", "0")
    assert "B1: not run" in late.stdout
    assert "B1" not in outcomes(checkout)


def test_a_test_that_fails_without_the_mutation_kills_none(checkout: Path) -> None:
    """Other mutations of the same run keep their outcome."""
    path = checkout / "tests" / "mutations.toml"
    path.write_text(path.read_text() + BESIDES)
    (checkout / "tests" / "test_rest.py").write_text("def test_flawed():\n    assert False\n")
    done = run(checkout, "--only", "A2", "--only", "C1")
    assert done.returncode == 1
    assert outcomes(checkout) == {"A2": "killed", "C1": "fails without it too"}


def test_the_list_is_sound() -> None:
    """Ids differ, and the files that it names exist. Whether each text occurs once is seen when it is run."""
    entries = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    assert max(Counter(entry["id"] for entry in entries).values()) == 1
    for entry in entries:
        assert set(entry) == {"id", "area", "file", "before", "after", "tests"}
        assert entry["before"] != entry["after"]
        for test in [entry["file"], *entry["tests"]]:
            assert (ROOT / test.split("::")[0]).is_file(), entry["id"]
