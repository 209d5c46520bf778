"""vLLM's internals are used in the package ``compat`` alone, and its docstring says where each release difference is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import apollo_tp
from apollo_tp.vllm_plugin import compat

PACKAGE = Path(apollo_tp.__file__).parent
COMPAT = Path(compat.__file__).parent


def _imports_of_vllm(path: Path) -> list[int]:
    """Lines of ``path`` that import vLLM, at the top or in a function."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        lines += [node.lineno for name in names if name.split(".")[0] == "vllm"]
    return lines


def test_vllm_is_imported_in_compat_alone() -> None:
    importers = {path for path in PACKAGE.rglob("*.py") if _imports_of_vllm(path)}
    assert importers, "the check itself finds imports"
    assert {path.parent for path in importers} == {COMPAT}


def test_the_docstring_names_every_module_and_every_module_with_a_release_difference() -> None:
    """One grep word finds the differences, and the list of files is complete."""
    assert compat.__doc__ is not None
    described = set(re.findall(r"^    (\w+)\.py ", compat.__doc__, re.MULTILINE))
    assert described == {path.stem for path in COMPAT.glob("*.py")} - {"__init__"}
    outside = set(re.findall(r"``(\w+)`` \(", compat.__doc__))
    marked = {path for path in PACKAGE.rglob("*.py") if "# vLLM release" in path.read_text(encoding="utf-8")}
    assert {path.stem for path in marked if path.parent != COMPAT} == outside
