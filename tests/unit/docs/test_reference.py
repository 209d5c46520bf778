"""Pages of the reference say what the code has: its options, and the environment variables that it reads and sets."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support import options_page

ROOT = Path(__file__).parents[3]
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
