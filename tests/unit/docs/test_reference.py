"""Pages of the reference say what the code has: its options, and the environment variables that it reads and sets."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from apollo_tp.coordinator.http.errors import STATUS
from apollo_tp.coordinator.jobs.storage_error import Trouble
from tests.support import options_page

ROOT = Path(__file__).parents[3]
CODES_PAGE = ROOT / "docs/reference/errors.md"
CODE = re.compile(r"[a-z]+(?:_[a-z]+)*")
VARIABLES_PAGE = ROOT / "docs/reference/environment.md"
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|RANK|PATH|HOME|LANG|TMPDIR|PYTHONPATH")
NO_VARIABLES = {"OPENAI_API_SERVER"}
"""A member of vLLM's UsageContext."""


def test_the_page_of_options_is_what_the_schema_has() -> None:
    assert options_page.PAGE.read_text() == options_page.page(), "run `python -m tests.support.options_page`"


def named_in_code() -> set[str]:
    """Texts that look like a variable, in modules that have to do with the environment."""
    sources = [path.read_text() for path in (ROOT / "apollo_tp").rglob("*.py")]
    texts = {
        node.value
        for source in sources
        if "environ" in source or "_VARIABLE" in source
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {text for text in texts if VARIABLE.fullmatch(text)} - NO_VARIABLES


def test_the_page_of_variables_has_those_of_the_code_and_of_the_scripts() -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "launch").iterdir() if path.is_file())
    for_mps_and_mpi = set(re.findall(r"\b(?:CUDA_MPS|GLOO|NCCL)_[A-Z_]+\b", scripts))
    on_the_page = {text for text in re.findall(r"`(\w+)`", VARIABLES_PAGE.read_text()) if VARIABLE.fullmatch(text)}
    assert len(on_the_page) > 30
    assert on_the_page == named_in_code() | for_mps_and_mpi


def codes_in(source: str) -> set[str]:
    """Constants that are given as an error's code: by keyword, as a default, as a dict's value, or in a raw answer."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if ast.unparse(node.func) == "self._refuse":
                found += node.args[1:2]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            found += [value for key, value in zip(keys, node.values, strict=True) if key == "code"]
        elif isinstance(node, ast.arguments):
            found += [
                default
                for argument, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)
                if argument.arg == "code"
            ]
    return {str(node.value) for node in found if isinstance(node, ast.Constant)}


def test_the_page_of_codes_has_those_of_the_code() -> None:
    paths = [*(ROOT / "apollo_tp/coordinator").rglob("*.py"), ROOT / "apollo_tp/vllm_plugin/endpoints.py"]
    wanted = set[str]().union(*(codes_in(path.read_text()) for path in (*paths, ROOT / "apollo_tp/errors.py")))
    wanted |= {code for _, code in STATUS.values() if code} | {trouble.value for trouble in Trouble}
    wanted |= {f"no_such_{kind}" for kind in ("job", "file", "checkpoint")}
    wanted |= {f"invalid_{field}" for field in ("training_file", "validation_file")}
    rows = [row.split("|")[1] for row in CODES_PAGE.read_text().splitlines() if row.startswith("| `")]
    on_the_page = [code for row in rows for code in re.findall(r"`(\w+)`", row) if CODE.fullmatch(code)]
    assert len(on_the_page) > 40
    assert sorted(on_the_page) == sorted(wanted)
