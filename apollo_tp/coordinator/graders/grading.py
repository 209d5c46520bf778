"""Runs a grader on a completion."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apollo_tp.config import RlConfig
from apollo_tp.coordinator.graders.clients import api_client
from apollo_tp.coordinator.graders.formula import Formula
from apollo_tp.coordinator.graders.judge import judge
from apollo_tp.coordinator.graders.sandbox import run_python
from apollo_tp.coordinator.graders.schema import (
    Grader,
    Multi,
    Offered,
    Python,
    ScoreModel,
    Single,
    StringCheck,
    singles,
)
from apollo_tp.coordinator.graders.similarity import similarity
from apollo_tp.coordinator.graders.templates import GraderError, fill, namespaces

if TYPE_CHECKING:
    import httpx

ANSWER_SECONDS = 120.0
"""Deadline of one answer of a model that scores."""


@dataclass
class Grade:
    """What a completion is worth: ``reward``, or None with an ``error`` and its ``kind``, one of OpenAI's flags. ``scores``
    are those of the graders of a multi grader, ``tokens`` what models took, by name."""

    reward: float | None = None
    error: str = ""
    kind: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Grading:
    """What graders need: the ``client`` of the API of models that score (None: there is none), and limits of clients'
    code."""

    client: httpx.AsyncClient | None = None
    python_seconds: float = 10.0
    python_memory_bytes: int = 512 * 2**20

    async def grade(self, grader: Grader, item: dict[str, Any], output: str) -> Grade:
        """The grade of ``output``, a completion for ``item``. A sample that cannot be graded has a Grade that says why."""
        grade = Grade()
        values = namespaces(item, output)
        try:
            for name, each in singles(grader).items():
                score = await self._score(each, values, grade)
                if not math.isfinite(score):
                    raise GraderError(f"{name}: got {score}, expected a finite number")
                grade.scores[name] = score
            grade.reward = _combined(grader, grade.scores)
        except GraderError as error:
            grade.error, grade.kind = f"{grader.name}: {error}", error.kind
        return grade

    async def _score(self, grader: Single, values: dict[str, Any], grade: Grade) -> float:
        if isinstance(grader, ScoreModel):
            if self.client is None:
                raise GraderError("no rl.score_model_url is set", "model_grader_server_error")
            score, tokens = await judge(grader, values, self.client)
            grade.tokens[grader.model] = grade.tokens.get(grader.model, 0) + tokens
            return score
        if isinstance(grader, Python):
            return await run_python(grader.source, values, self.python_seconds, self.python_memory_bytes)
        text, reference = fill(grader.input, values), fill(grader.reference, values)
        if isinstance(grader, StringCheck):
            return float(check(grader.operation, text, reference))
        return await asyncio.to_thread(similarity, grader.evaluation_metric, text, reference)


@contextlib.asynccontextmanager
async def open_grading(options: RlConfig) -> AsyncIterator[Grading]:
    """What graders need, as the trainer's options say. Raises ConfigError."""
    async with contextlib.AsyncExitStack() as stack:
        client = None
        if options.score_model_url is not None:
            client = api_client(options.score_model_url, options.score_model_key_file, ANSWER_SECONDS)
            await stack.enter_async_context(client)
        yield Grading(client, options.python_grader_seconds)


def offered(options: RlConfig) -> Offered:
    """The types of graders that the trainer's options allow."""
    return Offered(score_model=options.score_model_url is not None, python=options.python_graders)


def _combined(grader: Grader, scores: dict[str, float]) -> float:
    if not isinstance(grader, Multi):
        return scores[grader.name]
    value = Formula(grader.calculate_output, "calculate_output").value(scores)
    if not math.isfinite(value):
        raise GraderError(f"calculate_output: got {value}, expected a finite number", "formula_parse_error")
    return value


def check(operation: str, text: str, reference: str) -> bool:
    """The string check: equal, different, or ``reference`` within ``text``; ``ilike`` in any case."""
    if operation in ("eq", "ne"):
        return (text == reference) == (operation == "eq")
    return reference.lower() in text.lower() if operation == "ilike" else reference in text
