"""Graders: what is offered, what a completion is worth, and what is told where it cannot be graded."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import msgspec
import pytest

from apollo_tp.config import RlConfig
from apollo_tp.coordinator.graders.clients import ATTEMPTS
from apollo_tp.coordinator.graders.formula import Formula
from apollo_tp.coordinator.graders.grading import Grade, offered, open_grading
from apollo_tp.coordinator.graders.schema import SIMILARITIES, Offered, check_item, read_grader
from apollo_tp.coordinator.graders.similarity import similarity
from apollo_tp.coordinator.graders.templates import GraderError, fill, namespaces
from apollo_tp.errors import RequestError
from tests.support.completions import FakeServer, fake_server

ALL = Offered(score_model=True, python=True)
STRINGS = {"type": "string_check", "name": "s", "operation": "eq", "input": "{{sample.output_text}}",
           "reference": "{{ item.answer }}"}  # fmt: skip
TEXTS = {"type": "text_similarity", "name": "t", "evaluation_metric": "rouge_1", "input": "{{sample.output_text}}",
         "reference": "{{item.answer}}"}  # fmt: skip
JUDGE = {"type": "score_model", "name": "j", "model": "big", "range": [0, 10],
         "sampling_params": {"max_completions_tokens": 9},
         "input": [{"role": "user", "content": "Rate {{sample.output_text}} for {{item.answer}}"}]}  # fmt: skip
MULTI = {"type": "multi", "name": "m", "calculate_output": "b"}
PYTHON = {"type": "python", "name": "p", "source": "def grade(sample, item):\n    return len(sample['output_text'])"}


def grade(grader: dict[str, Any], output: str, item: dict[str, Any] | None = None, **options: Any) -> Grade:
    async def run() -> Grade:
        async with open_grading(RlConfig(**options)) as grading:
            return await grading.grade(read_grader(grader, ALL), item or {"answer": "Yes"}, output)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("operation", "output", "reward"),
    [
        ("eq", "Yes", 1), ("eq", "yes", 0), ("ne", "yes", 1), ("ne", "Yes", 0),
        ("like", "Oh Yes!", 1), ("like", "oh yes!", 0), ("ilike", "oh yes!", 1), ("ilike", "no", 0),
    ],
)  # fmt: skip
def test_string_checks(operation: str, output: str, reward: float) -> None:
    assert grade(STRINGS | {"operation": operation}, output).reward == reward


@pytest.mark.parametrize(
    ("metric", "value"),
    [("rouge_1", 2 * 2 / 7), ("rouge_2", 2 * 1 / 5), ("rouge_3", 0), ("rouge_l", 2 * 2 / 7), ("gleu", 3 / 10)],
)
def test_similarities_of_words_are_those_of_their_formulas(metric: str, value: float) -> None:
    """Four words against three, of which two, and one pair of neighbours, are in both."""
    assert similarity(metric, "The cat sat up", "the cat lay") == pytest.approx(value)


def test_fuzzy_match_is_the_share_of_matching_characters() -> None:
    assert similarity("fuzzy_match", "abcd", "bcde") == 2 * 3 / 8


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_equal_texts_are_as_similar_as_can_be_and_unrelated_ones_not_at_all(metric: str) -> None:
    text = "one two three four five six"
    assert similarity(metric, text, text) == 1.0
    assert similarity(metric, "", text) == 0.0
    assert similarity(metric, text, "") == 0.0


@pytest.mark.parametrize("metric", SIMILARITIES)
@pytest.mark.parametrize("texts", [("x" * 100_000, "xy" * 50_000), ("x " * 50_000, "x y " * 25_000)])
def test_no_texts_of_a_client_take_long(metric: str, texts: tuple[str, str]) -> None:
    """The coordinator answers nobody meanwhile: difflib took 37 s for two of 2,000 characters."""
    began = time.process_time()
    assert 0.0 <= similarity(metric, *texts) <= 1.0
    assert time.process_time() - began < 2


def test_the_longest_common_subsequence_keeps_the_order() -> None:
    assert similarity("rouge_l", "c b a", "a b c") == pytest.approx(1 / 3)
    assert similarity("rouge_1", "c b a", "a b c") == 1.0


def test_templates_name_fields_of_the_line_and_of_the_completion() -> None:
    values = namespaces({"a": {"b": [1, {"c": "x"}]}, "n": 2.5}, '{"k": [true]}')
    assert (
        fill("{{item.a.b[1].c}} {{ item.n }} {{sample.output_json.k}} {{sample.output_text}}", values)
        == 'x 2.5 [true] {"k": [true]}'
    )
    for tag, kind in (("item.none", "invalid_variable_error"), ("item.a.b[2]", "invalid_variable_error"),
                      ("sample.output_json.z", "sample_parse_error")):  # fmt: skip
        with pytest.raises(GraderError) as raised:
            fill(f"{{{{{tag}}}}}", values)
        assert raised.value.kind == kind


def test_a_completion_is_no_template() -> None:
    """Otherwise a model could quote the answer by its name."""
    assert grade(STRINGS, "{{item.answer}}").reward == 0


def test_multi_combines_by_its_formula() -> None:
    multi = {
        "type": "multi",
        "name": "m",
        "graders": {"s": STRINGS, "t": TEXTS},
        "calculate_output": "0.25 * s + 0.75 * t",
    }
    found = grade(multi, "Yes")
    assert (found.reward, found.scores) == (1.0, {"s": 1.0, "t": 1.0})
    assert grade(multi, "yes").reward == 0.75
    single = {"type": "multi", "name": "m", "graders": STRINGS, "calculate_output": "s - 1"}  # as the SDK's type has it
    assert grade(single, "no").reward == -1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + 2 * b", 7),
        ("(a + 2) * b", 9),
        ("-a ^ 2", -1),
        ("2 ^ b", 8),
        ("max(a, b, 2)", 3),
        ("sqrt(floor(b + 1.5))", 2),
    ],
)
def test_formulas(text: str, value: float) -> None:
    formula = Formula(text, "f")
    formula.check(["a", "b"])
    assert formula.value({"a": 1.0, "b": 3.0}) == value


@pytest.mark.parametrize(
    "text",
    ["a.__class__", "__import__('os')", "a if a else b", "[a]", "a < b", "lambda: 1", "'x' * 9", "a; b", "f(a)",
     "min(a, key=b)", "a[0]", "1j", "True", "(" * 300 + "a" + ")" * 300, "+".join("a" * 200), "c"],
)  # fmt: skip
def test_anything_but_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        Formula(text, "f").check(["a", "b"])


@pytest.mark.parametrize("text", ["1 / (a - a)", "log(0)", "exp(9999)", "2 ^ 99999", "(0 - 2) ^ 0.5", "min(a)"])
def test_a_formula_without_a_value_is_an_error_of_the_grader(text: str) -> None:
    with pytest.raises(GraderError) as raised:
        Formula(text, "f").value({"a": 1.0})
    assert raised.value.kind == "formula_parse_error"


@pytest.fixture
def server() -> Any:
    with fake_server() as server:
        yield server


def test_a_model_scores(server: FakeServer) -> None:
    server.judged = '{"result": 7.5}'
    found = grade(JUDGE, "this", score_model_url=f"{server.url}/v1")
    assert (found.reward, found.tokens) == (7.5, {"big": 7})
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "user", "content": "Rate this for Yes"}]
    assert (asked["model"], asked["max_completion_tokens"]) == ("big", 9)
    assert asked["response_format"]["json_schema"]["schema"]["required"] == ["result"]


@pytest.mark.parametrize(
    ("judged", "status", "kind"),
    [
        ("seven", 200, "model_grader_parse_error"), ('{"result": 11}', 200, "model_grader_parse_error"),
        ('{"result": 1}', 400, "model_grader_server_error"), ('{"result": 1}', 503, "model_grader_server_error"),
    ],
)  # fmt: skip
def test_a_model_that_gives_no_score_gives_no_reward(server: FakeServer, judged: str, status: int, kind: str) -> None:
    server.judged, server.status = judged, status
    found = grade(JUDGE, "this", score_model_url=f"{server.url}/v1")
    assert found.reward is None
    assert found.kind == kind
    assert len(server.asked) == (ATTEMPTS if status == 503 else 1), "a busy server is asked again, a refusal is final"


def test_the_code_of_a_client_is_run_where_it_is_allowed() -> None:
    assert grade(PYTHON, "four").reward == 4.0


@pytest.mark.parametrize(
    ("grader", "field", "words"),
    [
        (PYTHON, "grader.type", "rl.python_graders"), (JUDGE, "grader.type", "rl.score_model_url"),
        ({"type": "label_model", "name": "l"}, "grader.type", "string_check"), ({}, "grader", "type"),
        (STRINGS | {"operation": "regex"}, "grader.operation", "regex"), (STRINGS | {"extra": 1}, "grader", "extra"),
        (STRINGS | {"input": "{{sample.output_texts}}"}, "grader.input", "output_text"),
        (STRINGS | {"reference": "{{answer}}"}, "grader.reference", "item.FIELD"),
        (TEXTS | {"evaluation_metric": "cosine"}, "grader.evaluation_metric", "rouge_l"),
        (MULTI | {"graders": {"a": STRINGS}}, "grader.calculate_output", "'b'"),
        (MULTI | {"graders": {"b": PYTHON}}, "grader.graders.b.type", "python"),
    ],
)  # fmt: skip
def test_what_is_not_offered_is_refused_with_what_is(grader: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_grader(grader, offered(RlConfig()))
    assert raised.value.field == field
    assert words in str(raised.value)


def test_images_are_refused() -> None:
    part = {"type": "input_image", "image_url": "x"}
    with pytest.raises(RequestError, match="input_image"):
        read_grader(JUDGE | {"input": [{"role": "user", "content": [part]}]}, ALL)


def test_a_line_must_have_what_a_grader_names() -> None:
    grader = read_grader(JUDGE, ALL)
    check_item(grader, {"answer": "x"})
    with pytest.raises(RequestError, match=r"item\.answer"):
        check_item(grader, {"answers": "x"})


def test_a_grader_is_stored_and_read_again() -> None:
    from apollo_tp.coordinator.graders.schema import Grader

    for each in (STRINGS, TEXTS, JUDGE, PYTHON):
        grader = read_grader(each, ALL)
        assert msgspec.json.decode(msgspec.json.encode(grader), type=Grader) == grader


def test_a_score_that_is_not_finite_is_none() -> None:
    found = grade(
        {"type": "multi", "name": "m", "graders": {"s": STRINGS}, "calculate_output": "exp(s * 700) * exp(s * 700)"},
        "Yes",
    )
    assert found.reward is None or math.isfinite(found.reward)
    assert found.kind == "formula_parse_error"
