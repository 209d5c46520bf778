"""Which tokens of a sample are learned from: exact against transformers, or refused."""

import pytest
from transformers import AutoTokenizer

from apollo_tp.coordinator.chat_template import MARK, Template
from apollo_tp.coordinator.intake import Intake, Limits
from apollo_tp.coordinator.jobs import Truncate
from apollo_tp.coordinator.render import Chat, Renderer
from apollo_tp.coordinator.schema import (
    Message,
    Preference,
    PreferenceLine,
    SampleBody,
    SupervisedLine,
    TrainBody,
    decode,
)
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.manifest import ChatTemplate, Serving
from tests.unit.chat_model import (
    CALLING,
    CHATML,
    COUNTING,
    INST,
    MARKED,
    PROMPTED,
    THINKING,
    THINKING_CALLS,
    write_model,
)

TURNS = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am fine, thanks."},
    {"role": "user", "content": "how are you? é 漢字 "},
    {"role": "assistant", "content": " the answer\nis 42. "},
]


@pytest.fixture(
    params={"chatml": CHATML, "thinking": THINKING, "marked": MARKED, "inst": INST}.items(), ids=lambda p: p[0]
)
def named(request, tmp_path):
    name, template = request.param
    folder = write_model(tmp_path / "m", template)
    return name, Renderer(folder), AutoTokenizer.from_pretrained(folder)


def chat(messages, **options):
    return Chat([Message(**message) for message in messages], **options)


def learned(renderer, messages, **options):
    """The text of each run of learned tokens, and all tokens."""
    weights = [1.0 for message in messages if message["role"] == "assistant"]
    ids, values = renderer.chat(chat(messages, **options), weights, 1000)
    runs, last = [], 0.0
    for token, value in zip(ids, values, strict=True):
        if value:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = value
    return [renderer._tokenizer.decode(run, skip_special_tokens=False) for run in runs], ids


def test_tokens_are_those_of_transformers(named):
    """The same ids as transformers' apply_chat_template, for every template: what is trained is what is served."""
    _, renderer, reference = named
    assert learned(renderer, TURNS)[1] == reference.apply_chat_template(TURNS, return_dict=False)


def test_assistant_turns_and_nothing_else_are_learned(named):
    """Every assistant turn with its end-of-turn token; no user text, no header, no white space behind the end."""
    name, renderer, _ = named
    expected = {
        "chatml": ["I am fine, thanks.<|im_end|>", " the answer\nis 42. <|im_end|>"],
        "marked": ["I am fine, thanks.<|im_end|>", " the answer\nis 42. <|im_end|>"],
        "thinking": ["I am fine, thanks.<|im_end|>", "<think>\n\n</think>\n\n the answer\nis 42. <|im_end|>"],
        "inst": [" I am fine, thanks.<|im_end|>", " the answer\nis 42.<|im_end|>"],
    }
    assert learned(renderer, TURNS)[0] == expected[name]


def test_marks_agree_with_transformers_mask(tmp_path):
    """With {% generation %} marks, the mask is transformers' own assistant mask.

    Contents without outer spaces: transformers loses a turn whose first character is one that trimmed offsets skip.
    """
    folder = write_model(tmp_path, MARKED)
    turns = [turn | {"content": turn["content"].strip()} for turn in TURNS]
    answer = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, weights = Renderer(folder).chat(chat(turns), [1.0, 1.0], 1000)
    assert ids == answer["input_ids"]
    assert [int(weight > 0) for weight in weights] == answer["assistant_masks"]


def test_reasoning_that_the_template_drops_is_not_learned(tmp_path):
    """Earlier turns lose their reasoning in the rendering; what is left of them is still told exactly."""
    renderer = Renderer(write_model(tmp_path, THINKING))
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>\nbecause\n</think>\n\nI am fine"
    turns[3]["content"] = "<think>\nreason\n</think>\n\n42"
    assert learned(renderer, turns)[0] == ["I am fine<|im_end|>", "<think>\nreason\n</think>\n\n42<|im_end|>"]


def test_weights_per_message(tmp_path):
    """A weight scales its own turn's tokens; 0 makes it context."""
    renderer = Renderer(write_model(tmp_path))
    _, values = renderer.chat(chat(TURNS), [0.0, 0.5], 1000)
    assert set(values) == {0.0, 0.5}
    first = next(index for index, value in enumerate(values) if value)
    assert renderer._tokenizer.decode(
        renderer.chat(chat(TURNS), [0.0, 0.5], 1000)[0][first:], skip_special_tokens=False
    ) == (" the answer\nis 42. <|im_end|>\n")


def test_an_untellable_template_is_refused(tmp_path):
    """A template whose beginning depends on its end is refused with the reason, not guessed."""
    with pytest.raises(RequestError, match="cannot be told exactly") as error:
        learned(Renderer(write_model(tmp_path, COUNTING)), TURNS)
    assert error.value.field == "messages"


def test_a_templates_own_refusal_is_a_request_error(tmp_path):
    """raise_exception of a template becomes a 4xx with its text."""
    renderer = Renderer(write_model(tmp_path, INST))
    with pytest.raises(RequestError, match="no role system"):
        learned(renderer, [{"role": "system", "content": "x"}, *TURNS])


def test_templates_run_in_a_sandbox(tmp_path):
    """A template cannot reach Python's internals."""
    renderer = Renderer(write_model(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(RequestError, match="refused"):
        learned(renderer, TURNS)


def test_no_template_no_tokenizer(tmp_path):
    """Without a chat template messages are refused, text is not; without tokenizer.json there is no renderer."""
    renderer = Renderer(write_model(tmp_path / "a", None))
    with pytest.raises(RequestError, match="no chat template"):
        learned(renderer, TURNS)
    assert renderer.text("Hello", append_eos=True)[0][-1] == renderer.eos_id
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Renderer(tmp_path / "nothing")


def test_the_servers_own_template_and_tokenizer_count(tmp_path):
    """vLLM's --chat-template and --tokenizer: what the model's folder says of either is not what is served."""
    model, other = write_model(tmp_path / "model", INST), write_model(tmp_path / "other", CHATML, vocab_size=300)
    ids = learned(Renderer(model, None, Serving(chat=ChatTemplate(text=MARKED))), TURNS)[1]
    marked = AutoTokenizer.from_pretrained(write_model(tmp_path / "marked", MARKED))
    assert ids == marked.apply_chat_template(TURNS, return_dict=False)
    assert (
        learned(Renderer(model, None, Serving(chat=ChatTemplate(text=MARKED))), TURNS)[0][0]
        == "I am fine, thanks.<|im_end|>"
    )
    reference = AutoTokenizer.from_pretrained(other)
    assert learned(Renderer(model, other), TURNS)[1] == reference.apply_chat_template(TURNS, return_dict=False)
    with pytest.raises(ConfigError, match=r"nothing: got no tokenizer\.json"):
        Renderer(model, tmp_path / "nothing")


def test_without_a_servers_word_the_folders_templates_count(tmp_path):
    """A vllm.LLM has no API server to ask: named templates, in either place where transformers keeps them."""
    named = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}" + CHATML},
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    for folder in (write_model(tmp_path / "named", named), write_model(tmp_path / "files", CHATML)):
        if folder.name == "files":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(named[1]["template"])
        renderer = Renderer(folder)
        plain, with_tools = learned(renderer, TURNS)[1], learned(renderer, TURNS, tools=[tool])[1]
        assert with_tools == [*renderer.encode("f", special=False), *plain]


def test_a_turn_over_parts_that_later_messages_change_is_told(tmp_path):
    """Its mark goes behind its last part."""
    template = THINKING.replace("m.content", "(m.content | map(attribute='text') | join)")
    serving = Serving(chat=ChatTemplate(text=template, parts=True))
    strings, parts = Renderer(write_model(tmp_path / "m", THINKING)), Renderer(tmp_path / "m", None, serving)
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\nso\n</think>\n\nI am fine"}, *TURNS[2:]]
    assert learned(parts, turns) == learned(strings, turns)
    empty = [TURNS[0], {"role": "assistant", "content": []}, *TURNS[2:]]
    with pytest.raises(RequestError, match="no text content"):
        learned(parts, empty)


def tool_round(*more):
    calls = [{"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    return [TURNS[0], asked, {"role": "tool", "content": "42", "tool_call_id": "1"}, TURNS[1], *more]


def test_a_turn_that_only_calls_tools_is_told(tmp_path):
    """OpenAI's usual round. Its mark goes behind the last call's name: behind an empty content it would change the text."""
    renderer = Renderer(write_model(tmp_path, THINKING_CALLS))
    calls = "<call>f</call>\n<call>g</call><|im_end|>"
    thought = "<think>\n\n</think>\n\n"
    assert learned(renderer, tool_round())[0] == [thought + calls, thought + "I am fine, thanks.<|im_end|>"]
    # once another question has followed, its reasoning is gone: with which the second turn had been asked for
    with pytest.raises(RequestError, match="message 3: its generation prompt"):
        learned(renderer, tool_round(*TURNS[2:]))
    ids, values = renderer.chat(chat(tool_round(*TURNS[2:])), [1.0, 0.0, 1.0], 1000)
    taken = [token for token, value in zip(ids, values, strict=True) if value]
    assert renderer._tokenizer.decode(taken, skip_special_tokens=False) == (
        calls + thought + " the answer\nis 42. <|im_end|>"
    )


def test_turns_of_weight_0_need_not_be_told(tmp_path):
    """Where the generation prompt begins what earlier turns do not keep, the last turn can be learned; and what to do is
    said."""
    renderer = Renderer(write_model(tmp_path, PROMPTED))
    with pytest.raises(RequestError, match="with weight 0 for the assistant messages before it"):
        renderer.chat(chat(TURNS), [1.0, 1.0], 1000)
    ids, values = renderer.chat(chat(TURNS), [0.0, 0.5], 1000)
    taken = [token for token, value in zip(ids, values, strict=True) if value]
    assert (
        renderer._tokenizer.decode(taken, skip_special_tokens=False) == "\n</think>\n\n the answer\nis 42. <|im_end|>"
    )
    messages = [Message(**message) for message in TURNS]
    line = PreferenceLine(
        input=Preference(messages=messages[:3]), preferred_output=messages[3:], non_preferred_output=[ANSWER]
    )
    pair = Intake(renderer, Limits(400, 400), Truncate.refuse).pair(line)
    assert pair.preferred.token_ids == ids
    assert [bool(weight) for weight in pair.preferred.weights] == [bool(value) for value in values]


@pytest.mark.parametrize("template", [THINKING_CALLS, PROMPTED], ids=["thinking", "prompted"])
def test_a_conversation_that_does_not_show_its_turns_is_learned_turn_by_turn(tmp_path, template):
    """Each behind what the server would have been asked with, as transformers renders it, and up to its end."""
    folder = write_model(tmp_path, template)
    renderer, reference = Renderer(folder), AutoTokenizer.from_pretrained(folder)
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
    with pytest.raises(RequestError, match="cannot be told"):
        intake.samples([body])  # a score is of one sequence
    told = SampleBody(messages=[Message(**message) for message in TURNS[:2]])
    assert intake.sequences(told, "") == [intake.sample(told, "")]
    assert intake.train_samples(TrainBody(samples=[told, body])) == [
        intake.sample(told, ""),
        *intake.sequences(body, ""),
    ]
    both = SampleBody(messages=[body.messages[0], ANSWER, ANSWER])
    with pytest.raises(RequestError) as error:
        intake.train_samples(TrainBody(samples=[told, both, SampleBody(text="x", tools=[])]))
    assert error.value.field == "samples[2].tools"


def test_marks_that_change_the_text_are_refused(tmp_path):
    """They would be trained; and any form of the tag is one."""
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    expected = learned(Renderer(write_model(tmp_path / "plain", plain)), TURNS)
    forms = Renderer(write_model(tmp_path / "forms", MARKED.replace("{% generation", "{%+ generation")))
    assert learned(forms, TURNS)[1] == expected[1]
    assert learned(forms, TURNS)[0] == expected[0]
    trimmed = MARKED.replace("{% generation %}", "{% set t %}{% generation %}  ").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ t | trim }}"
    )
    with pytest.raises(RequestError, match="depends on its own marks"):
        learned(Renderer(write_model(tmp_path / "trimmed", trimmed)), TURNS)


@pytest.mark.parametrize(
    "expression",
    [
        "1 // x",
        "range(10 ** 9)",
        "'y' * 10 ** 12",
        "10.0 ** 1000",
        "messages.sort()",
        "[].index(x)",
        "''.encode('none')",
    ],
)
def test_whatever_a_template_raises_is_the_clients_error(tmp_path, expression):
    """A template is a program, and runs on what the client sends."""
    renderer = Renderer(write_model(tmp_path, CHATML + "{{ " + expression + " }}"))
    with pytest.raises(RequestError, match="the chat template refused them"):
        learned(renderer, TURNS, chat_template_kwargs={"x": 0})


def test_special_tokens_are_those_of_the_server(tmp_path):
    """Which may have them from its tokenizer's class, or from files that the coordinator does not read."""
    folder = write_model(tmp_path, INST)
    told = Serving(
        chat=ChatTemplate(text=INST), special_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|im_start|>"}
    )
    renderer = Renderer(folder, None, told)
    assert learned(renderer, TURNS)[0][0].endswith("thanks.<|im_start|>")
    assert learned(renderer, TURNS)[1][0] == renderer._tokenizer.token_to_id("<|endoftext|>")
    assert renderer.eos_id == renderer._tokenizer.token_to_id("<|im_start|>")


def test_how_long_a_conversation_is_is_asked_first(tmp_path, monkeypatch):
    """To tell its turns takes as many renderings of it."""
    renderings = []
    render = Template.render
    monkeypatch.setattr(Template, "render", lambda *args, **more: renderings.append(1) or render(*args, **more))
    body = SampleBody(messages=[Message(**turn) for turn in TURNS * 100])
    for truncate in (Truncate.refuse, Truncate.left):
        intake = Intake(Renderer(write_model(tmp_path)), Limits(400, 64), truncate)
        with pytest.raises(RequestError) as error:
            intake.sample(body, "")
        assert error.value.code == "sequence_too_long"
    assert len(renderings) == 4
    body = SampleBody(messages=[Message(**turn) for turn in TURNS * 10])
    assert len(intake.sample(body, "").token_ids) == 64


def test_several_parts_are_joined_as_the_server_said_or_not_at_all(tmp_path):
    """Without an API server nobody said it."""
    turns = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]}, TURNS[1]]
    folder = write_model(tmp_path)
    with pytest.raises(RequestError, match="no server that said how it joins them"):
        learned(Renderer(folder), turns)
    assert learned(Renderer(folder, None, Serving(chat=ChatTemplate(text=CHATML))), turns)[0]


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        (
            Serving(chat_refusal="vLLM renders them by X"),
            "got a conversation, but vLLM renders them by X, expected prompt",
        ),
        (Serving(chat=ChatTemplate(text="{% for %}")), "a template with an error"),
        (Serving(chat_with_tools=ChatTemplate(text=CHATML)), "the served model has no chat template"),
    ],
)
def test_a_server_that_renders_otherwise_takes_no_messages(tmp_path, serving, message):
    """And takes everything else."""
    renderer = Renderer(write_model(tmp_path), None, serving)
    with pytest.raises(RequestError, match=message) as error:
        learned(renderer, TURNS)
    assert error.value.field == "messages"
    assert renderer.text("Hello", append_eos=True)[0]


def test_the_mark_of_turns_cannot_be_smuggled_in(tmp_path):
    """In a message, or in what the template is given beside it."""
    renderer = Renderer(write_model(tmp_path))
    for turns, options in (
        ([TURNS[0] | {"content": MARK}, TURNS[1]], {}),
        (TURNS, {"chat_template_kwargs": {"x": [MARK]}}),
    ):
        with pytest.raises(RequestError, match="own mark"):
            learned(renderer, turns, **options)


def test_prompt_completion_and_text(tmp_path):
    """Prompt and completion are tokenised apart; the end-of-text token is learned unless switched off."""
    renderer = Renderer(write_model(tmp_path))
    intake = Intake(renderer, Limits(400, 64), Truncate.refuse)
    prompt, completion = renderer.encode("Hello", special=True), renderer.encode(" there", special=False)
    sample = intake.sample(SampleBody(prompt="Hello", completion=" there"), "")
    assert sample.token_ids == [*prompt, *completion, renderer.eos_id]
    assert sample.weights == [0.0] * len(prompt) + [1.0] * (len(completion) + 1)
    sample = intake.sample(SampleBody(prompt="Hello", completion=" there", append_eos=False, weight=2.0), "")
    assert sample.token_ids == [*prompt, *completion]
    assert set(sample.weights) == {0.0, 2.0}
    sample = intake.sample(SampleBody(text="Hello there"), "")
    assert sample.token_ids == [*renderer.encode("Hello there", special=True), renderer.eos_id]
    assert sample.weights == [0.0] + [1.0] * (len(sample.token_ids) - 1)


ANSWER = Message(role="assistant", content="x")
FUNCTION = {"type": "function", "function": {"name": "f"}}


def call(arguments, **other):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}} | other


def test_messages_reach_the_template_as_in_vllm(tmp_path):
    """Arguments are decoded, empty tool_calls dropped, text parts joined by lines: as vLLM's chat_utils does it."""
    renderer = Renderer(write_model(tmp_path, CALLING), None, Serving(chat=ChatTemplate(text=CALLING)))
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
    intake = Intake(Renderer(write_model(tmp_path, CALLING)), Limits(400, 400), Truncate.refuse)
    messages = [Message(role="user", content="x"), Message(role="assistant", tool_calls=[call('{"a": "\\ud83d"}')])]
    with pytest.raises(RequestError, match="characters that are none"):
        intake.sample(SampleBody(messages=messages), "")


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", "nul", "[" * 100_000, [1]])
def test_arguments_that_are_no_object_are_refused(tmp_path, arguments):
    """vLLM serves {} in their place; learning that would be learning another conversation."""
    intake = Intake(Renderer(write_model(tmp_path, CALLING)), Limits(400, 400), Truncate.refuse)
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
        (SampleBody(text="x", chat_template_kwargs={}), "chat_template_kwargs"),
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
        (SampleBody(messages=[Message(role="assistant", refusal="no")]), "messages[0].content"),
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
    """Every refusal says field, got and expected."""
    intake = Intake(Renderer(write_model(tmp_path)), Limits(400, 64), Truncate.refuse)
    with pytest.raises(RequestError) as error:
        intake.sample(body, "samples[3].")
    assert error.value.field == f"samples[3].{field}"
    assert error.value.got
    assert error.value.expected


def test_no_depth_of_nesting_is_an_error_of_ours(tmp_path):
    """Each is taken or refused: an exception nobody foresaw would leave an OpenAI job in validation for ever."""
    limits = Limits(1000, 100_000)
    intake = Intake(Renderer(write_model(tmp_path / "model")), limits, Truncate.refuse)
    line = (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": '
        '[{"type": "function", "id": "a", "function": {"name": "f", "arguments": {"a": %s%s}}}]}]}'
    )
    refused = 0
    for depth in range(900, 1100):
        try:
            intake.sample(decode((line % ("[" * depth, "]" * depth)).encode(), SupervisedLine), "")
        except RequestError:
            refused += 1
    assert 0 < refused < 200
