"""``calculate_output`` of a multi grader: arithmetic over the rewards of its graders, read by Python's parser and evaluated
here, so that nothing else can be written in it."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from apollo_tp.coordinator.graders.templates import GraderError
from apollo_tp.errors import refuse

BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil, "exp": math.exp, "sqrt": math.sqrt,
    "log": math.log,
}  # fmt: skip
EXPECTED = f"numbers, names of graders, + - * / ^, brackets, and {', '.join(FUNCTIONS)}"
MAX_DEPTH = 50


class Formula:
    """A formula as a client wrote it. Raises RequestError naming ``field`` for anything but arithmetic."""

    def __init__(self, text: str, field: str) -> None:
        self._text, self._field = text, field
        try:
            self._tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refuse("no formula") from error
        self.names: set[str] = set()
        self._read(self._tree, 0)

    def _refuse(self, got: str) -> Exception:
        return refuse(self._field, f"{self._text[:80]!r}, which has {got}", EXPECTED)

    def check(self, known: Iterable[str]) -> None:
        """Raise RequestError for a name that is no grader's."""
        if unknown := self.names - set(known):
            raise self._refuse(f"the unknown name {min(unknown)!r}")

    def _read(self, node: ast.AST, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._refuse(f"more than {MAX_DEPTH} levels")
        children: list[Any] = []
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            children = [node.left, node.right]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            children = [node.operand]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            children = [*node.args, *node.keywords]
        elif isinstance(node, ast.Name):
            self.names.add(node.id)
        elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
            raise self._refuse(f"{ast.unparse(node)[:40]!r}")
        for child in children:
            self._read(child, depth + 1)

    def value(self, rewards: Mapping[str, float]) -> float:
        """The formula's value. Raises GraderError where it has none."""
        try:
            return float(self._value(self._tree, rewards))
        except (ArithmeticError, ValueError, TypeError) as error:
            raise GraderError(f"{self._text[:80]!r} has no value: {error}", "formula_parse_error") from error

    def _value(self, node: Any, rewards: Mapping[str, float]) -> float:
        if isinstance(node, ast.BinOp):
            return BINARY[type(node.op)](self._value(node.left, rewards), self._value(node.right, rewards))
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, rewards)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.Call):
            return FUNCTIONS[node.func.id](*(self._value(each, rewards) for each in node.args))  # type: ignore[attr-defined]
        return rewards[node.id] if isinstance(node, ast.Name) else float(node.value)
