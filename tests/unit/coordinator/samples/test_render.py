"""Which tokens of a sample are learned from: exact against transformers, or refused."""

import pytest
from transformers import AutoTokenizer

from apollo_tp.coordinator.jobs.job import Truncate
from apollo_tp.coordinator.samples.chat_template import MARK
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.render import Chat, Renderer
from apollo_tp.coordinator.samples.schema import Message, Preference, PreferenceLine
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.shards.serving import ChatTemplate, Serving
from tests.support.chat_model import (
    CHATML,
    COUNTING,
    INST,
    MARKED,
    PROMPTED,
    THINKING,
    THINKING_CALLS,
    TURNS,
    tool_round,
    write_model,
)


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
        input=Preference(messages=messages[:3]),
        preferred_output=messages[3:],
        non_preferred_output=[Message(role="assistant", content="x")],
    )
    pair = Intake(renderer, Limits(400, 400), Truncate.refuse).pair(line)
    assert pair.preferred.token_ids == ids
    assert [bool(weight) for weight in pair.preferred.weights] == [bool(value) for value in values]


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
