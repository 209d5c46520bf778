"""What a client sends becomes samples, or is refused with its field: messages and tools as vLLM takes them."""

import pytest
from transformers import AutoTokenizer

from apollo_tp.coordinator.samples.conversation import Template
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.schema import Message, SampleBody, TrainBody, Truncate, decode
from apollo_tp.errors import RequestError
from tests.support.chat_model import CALLING, PROMPTED_CALLS, THINKING_CALLS, TURNS, tool_round, write_model
from tests.support.served_model import renderer_of

ANSWER = Message(role="assistant", content="x")
FUNCTION = {"type": "function", "function": {"name": "f"}}


def test_prompt_completion_and_text(tmp_path):
    """Prompt and completion are tokenised separately; the end-of-text token is learned unless switched off."""
    renderer = renderer_of(write_model(tmp_path))
    intake = Intake(renderer, Limits(400, 64), Truncate.refuse)
    prompt, completion = renderer.encode("Hello"), renderer.encode(" there")
    sample = intake.sample(SampleBody(prompt="Hello", completion=" there"), "")
    assert sample.token_ids == [*prompt, *completion, renderer.eos_id]
    assert sample.weights == [0.0] * len(prompt) + [1.0] * (len(completion) + 1)
    sample = intake.sample(SampleBody(prompt="Hello", completion=" there", append_eos=False, weight=2.0), "")
    assert sample.token_ids == [*prompt, *completion]
    assert set(sample.weights) == {0.0, 2.0}
    sample = intake.sample(SampleBody(text="Hello there"), "")
    assert sample.token_ids == [*renderer.encode("Hello there"), renderer.eos_id]
    assert sample.weights == [0.0] + [1.0] * (len(sample.token_ids) - 1)


def call(arguments, **other):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}} | other


def test_messages_reach_the_template_as_in_vllm(tmp_path):
    """Arguments are decoded, empty tool_calls dropped, text parts joined by lines: as vLLM's chat_utils does it."""
    renderer = renderer_of(write_model(tmp_path, CALLING))
    intake = Intake(renderer, Limits(400, 400), Truncate.refuse)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    calls = [call('{"b": "\\u00e9", "a": [1.5]}'), call({"c": None}), call(""), call(None)]
    messages = [
        Message(role="user", content=parts),
        Message(role="assistant", tool_calls=calls),
        Message(role="tool", content=parts, tool_call_id="1"),
        Message(role="assistant", content="x", tool_calls=[]),
    ]
    sample = intake.sample(SampleBody(messages=messages), "")
    assert renderer._tokenizer.decode(sample.token_ids, skip_special_tokens=False) == (
        "<|im_start|>user\none\ntwo<|im_end|>\n"
        '<|im_start|>assistant\n<call>f {"b": "é", "a": [1.5]}<call>f {"c": null}<call>f {}<call>f {}<|im_end|>\n'
        "<|im_start|>tool\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nx<|im_end|>\n"
    )


def test_half_a_character_is_refused(tmp_path):
    """A model's JSON may be cut in the middle of an emoji's escape."""
    intake = Intake(renderer_of(write_model(tmp_path, CALLING)), Limits(400, 400), Truncate.refuse)
    messages = [Message(role="user", content="x"), Message(role="assistant", tool_calls=[call('{"a": "\\ud83d"}')])]
    with pytest.raises(RequestError, match=r"half a character \(\\ud83d.*expected a JSON object"):
        intake.sample(SampleBody(messages=messages), "")


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", "nul", "[" * 100_000, [1]])
def test_arguments_that_are_no_object_are_refused(tmp_path, arguments):
    """vLLM serves {} in their place; learning that would be learning another conversation."""
    intake = Intake(renderer_of(write_model(tmp_path, CALLING)), Limits(400, 400), Truncate.refuse)
    messages = [Message(role="user", content="x"), Message(role="assistant", tool_calls=[call({}), call(arguments)])]
    with pytest.raises(RequestError) as error:
        intake.sample(SampleBody(messages=messages), "samples[3].")
    assert error.value.field == "samples[3].messages[1].tool_calls[1].function.arguments"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (SampleBody(prompt="x"), "completion"),
        (SampleBody(prompt="x", completion=""), "completion"),
        (SampleBody(messages=[Message(role="user", content="x")]), "messages"),
        (SampleBody(messages=[Message(role="assistant", content="x", weight=0)]), "messages"),
        (SampleBody(messages=[Message(role="user", content="x", weight=1)]), "messages[0].weight"),
        (SampleBody(text="x" * 500), "text"),
        (SampleBody(text="", append_eos=False), "text"),
        (SampleBody(text="x", tools=[{}]), "tools"),
        (SampleBody(text="x", chat_template_kwargs={"a": 1}), "chat_template_kwargs"),
        (SampleBody(messages=[Message(role="assistant", content="x")], tools=[{}]), "tools[0]"),
        (
            SampleBody(messages=[Message(role="assistant", content="x")], tools=[{"function": {"name": 1}}]),
            "tools[0].function.name",
        ),
        (SampleBody(messages=[Message(role="assistant", content=[{"type": "image_url"}])]), "messages[0].content[0]"),
        (
            SampleBody(messages=[Message(role="assistant", content=[{"type": "thinking", "text": "x"}])]),
            "messages[0].content[0]",
        ),
        (SampleBody(messages=[Message(role="assistant", refusal="no")]), "messages[0].refusal"),
        (
            SampleBody(messages=[Message(role="system", content="x-anthropic-billing-header: 1\nx"), ANSWER]),
            "messages[0].content",
        ),
        (SampleBody(messages=[ANSWER], chat_template_kwargs={"tools": [{}]}), "chat_template_kwargs.tools"),
        (SampleBody(messages=[ANSWER], chat_template_kwargs={"max_length": 1}), "chat_template_kwargs.max_length"),
        (SampleBody(messages=[ANSWER], tools=[FUNCTION | {"defer_loading": True}]), "tools[0].defer_loading"),
        (SampleBody(messages=[ANSWER], tools=[{"function": FUNCTION["function"] | {"x": 1}}]), "tools[0].function.x"),
        (
            SampleBody(messages=[ANSWER], tools=[{"function": FUNCTION["function"] | {"strict": "true"}}]),
            "tools[0].function.strict",
        ),
        (SampleBody(messages=[Message(role="assistant", tool_calls=[{}])]), "messages[0].tool_calls[0]"),
        (
            SampleBody(messages=[Message(role="assistant", tool_calls=[call("", type="custom")])]),
            "messages[0].tool_calls[0]",
        ),
    ],
)
def test_bad_samples_name_their_field(tmp_path, body, field):
    """Every refusal has field, got and expected."""
    intake = Intake(renderer_of(write_model(tmp_path)), Limits(400, 64), Truncate.refuse)
    with pytest.raises(RequestError) as error:
        intake.sample(body, "samples[3].")
    assert error.value.field == f"samples[3].{field}"
    assert error.value.got
    assert error.value.expected


def test_no_depth_of_nesting_is_an_error_of_ours(tmp_path):
    """Each is taken or refused: an exception nobody foresaw would leave an OpenAI job in validation for ever."""
    limits = Limits(1000, 100_000)
    intake = Intake(renderer_of(write_model(tmp_path / "model", CALLING)), limits, Truncate.refuse)
    line = (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": '
        '[{"type": "function", "id": "a", "function": {"name": "f", "arguments": {"a": %s%s}}}]}]}'
    )
    refused = 0
    for depth in (*range(100, 300), *range(900, 1100)):
        try:
            intake.sample(decode((line % ("[" * depth, "]" * depth)).encode(), SampleBody), "")
        except RequestError:
            refused += 1
    assert 200 < refused < 400


@pytest.mark.parametrize("template", [THINKING_CALLS, PROMPTED_CALLS], ids=["thinking", "prompted"])
def test_a_conversation_that_does_not_show_its_turns_is_learned_turn_by_turn(tmp_path, template):
    """Each after the prompt that the server would have got, as transformers renders it, and up to its end."""
    folder = write_model(tmp_path, template)
    renderer, reference = renderer_of(folder), AutoTokenizer.from_pretrained(folder)
    messages = tool_round(*TURNS[2:])
    intake = Intake(renderer, Limits(400, 400), Truncate.refuse)
    body = SampleBody(messages=[Message(**message) for message in messages], weight=0.5)
    sequences = intake.sequences(body, "")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(sequences) == len(turns) == 3
    for index, sequence in zip(turns, sequences, strict=True):
        before = [m | {"content": m["content"] or ""} for m in messages[:index]]
        prompt = reference.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert sequence.token_ids[: len(prompt)] == prompt
        assert sequence.weights == [0.0] * len(prompt) + [0.5] * (len(sequence.token_ids) - len(prompt) - 1) + [0.0]
        end = renderer._tokenizer.decode(sequence.token_ids[-2:], skip_special_tokens=False)
        assert end == "<|im_end|>\n"
    body.messages[1].weight = 0.0
    assert len(intake.sequences(body, "")) == 2
    with pytest.raises(RequestError, match="cannot be located"):
        intake.samples([body])  # a score is of one sequence
    simple = SampleBody(messages=[Message(**message) for message in TURNS[:2]])
    assert intake.sequences(simple, "") == [intake.sample(simple, "")]
    assert list(intake.train_samples(TrainBody(), [simple, body])) == [
        intake.sample(simple, ""),
        *intake.sequences(body, ""),
    ]
    both = SampleBody(messages=[body.messages[0], ANSWER, ANSWER])
    with pytest.raises(RequestError) as error:
        list(intake.train_samples(TrainBody(), [simple, both, SampleBody(text="x", tools=[{}])]))
    assert error.value.field == "samples[2].tools"


def test_the_length_of_a_conversation_is_checked_first(tmp_path, monkeypatch):
    """Locating its turns takes a rendering for each, so the length is checked before."""
    renderings = []
    render = Template.render
    monkeypatch.setattr(Template, "render", lambda *args, **more: renderings.append(1) or render(*args, **more))
    body = SampleBody(messages=[Message(**turn) for turn in TURNS * 100])
    for truncate in (Truncate.refuse, Truncate.left):
        intake = Intake(renderer_of(write_model(tmp_path)), Limits(400, 64), truncate)
        with pytest.raises(RequestError) as error:
            intake.sample(body, "")
        assert error.value.code == "sequence_too_long"
    assert len(renderings) == 2
    body = SampleBody(messages=[Message(**turn) for turn in TURNS * 10])
    assert len(intake.sample(body, "").token_ids) == 64
