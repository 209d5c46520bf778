"""No Python file over 400 lines, no function over 80: ``python scripts/check_sizes.py`` names each that is longer."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def oversized(path: Path) -> Iterator[str]:
    """One line for the file and for each of its functions that is too long."""
    text = path.read_text()
    if (count := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{path}: got {count} lines, expected at most {MAX_FILE_LINES}; divide it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name}: got {length} lines, expected at most {MAX_FUNCTION_LINES}"


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "*.py"], check=True, capture_output=True, text=True).stdout.split()
    problems = [line for name in listed if Path(name).exists() for line in oversized(Path(name))]
    print(*problems, sep="\n", end="\n" if problems else "")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
