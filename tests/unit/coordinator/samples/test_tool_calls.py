"""Tool calls are learned as they were sent, or refused: a name and arguments that are JSON."""

import pytest

from apollo_tp.coordinator.jobs.job import Truncate
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.schema import Message, SampleBody
from apollo_tp.errors import RequestError
from tests.support.chat_model import CALLING, write_model
from tests.support.served_model import renderer_of

TOLERANT = CALLING.replace("'<call>' + call.function.name + ' '", "'<call>' ~ call.function.name ~ ' '")


@pytest.fixture(scope="module")
def intake(tmp_path_factory):
    """Of a template that renders any name."""
    return Intake(renderer_of(write_model(tmp_path_factory.mktemp("m"), TOLERANT)), Limits(400, 400), Truncate.refuse)


def learned(intake, function, **call):
    """The learned text of a call of ``function``."""
    calls = [{"id": "1", "function": function} | call]
    messages = [Message(role="user", content="a"), Message(role="assistant", tool_calls=calls)]
    sample = intake.sample(SampleBody(messages=messages), "")
    return "".join(intake._renderer.decode([t for t, w in zip(sample.token_ids, sample.weights, strict=True) if w]))


@pytest.mark.parametrize("function", [{}, {"name": None}, {"name": ""}, {"name": 5}, {"name": ["f"]}])
def test_a_call_without_a_name_is_refused(intake, function):
    """Templates write it as nothing, or as None."""
    with pytest.raises(RequestError) as error:
        learned(intake, function | {"arguments": "{}"})
    assert error.value.field == "messages[1].tool_calls[0].function.name"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "twice"),
        ('{"a": NaN}', "JSON object"),
        ('{"a": -Infinity}', "JSON object"),
        ('{"a": 1e999}', "JSON object"),
        ('{"a": "\\ud800"}', "JSON object"),
        ('{"a": 1} ', None),
        ("[1]", "JSON object"),
        ("null", "JSON object"),
        ("{", "JSON object"),
        (" ", "JSON object"),
        ("[" * 3_000, "JSON"),
        (0, "JSON object"),
        (False, "JSON object"),
        ([1], "JSON object"),
    ],
)
def test_arguments_are_an_object_without_equal_keys(intake, arguments, what):
    """Of two equal keys a decoder keeps one in silence, and NaN would be learned as JSON."""
    function = {"name": "f", "arguments": arguments}
    if what is None:
        assert learned(intake, function) == '<call>f {"a": 1}<|im_end|>'
        return
    with pytest.raises(RequestError, match=what) as error:
        learned(intake, function)
    assert error.value.field.startswith("messages[1].tool_calls[0].function.arguments")


@pytest.mark.parametrize("arguments", [None, "", {}, [], "{}"])
def test_a_call_may_have_no_arguments(intake, arguments):
    """Null and empty are absent, as its type may be."""
    for call in ({}, {"type": None}, {"type": "function"}):
        assert learned(intake, {"name": "f", "arguments": arguments}, **call) == "<call>f {}<|im_end|>"
    kept = {"name": "f", "arguments": {"a": None, "b": ""}}
    assert learned(intake, kept) == '<call>f {"a": null, "b": ""}<|im_end|>'
