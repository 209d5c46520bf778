"""How the suite hangs together."""

import ast
from pathlib import Path

TESTS = Path(__file__).parents[2]


def imported(path):
    """Names of the modules that a file imports, those of relative imports with their dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_no_test_module_is_imported():
    """What tests share lives in tests/support: an import of a test module runs its set-up, and ties two together."""
    wrong = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in TESTS.rglob("*.py")
        for name in imported(path)
        if name.startswith((".", "tests.")) and any(part.startswith(("test_", "conftest")) for part in name.split("."))
    ]
    assert wrong == []
