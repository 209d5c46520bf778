"""Which tokens of a sample are learned from: exact against transformers, or refused."""

import pytest
from transformers import AutoTokenizer

from apollo_tp.coordinator.samples.conversation import MARK, Chat
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.samples.schema import Message, Preference, PreferenceLine, SampleBody, Truncate
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.shards.serving import TOKENIZER_FILE, ChatTemplate, Serving
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
from tests.support.served_model import publish_folder, renderer_of


@pytest.fixture(
    params={"chatml": CHATML, "thinking": THINKING, "marked": MARKED, "inst": INST}.items(), ids=lambda p: p[0]
)
def named(request, tmp_path):
    name, template = request.param
    folder = write_model(tmp_path / "m", template)
    return name, renderer_of(folder), AutoTokenizer.from_pretrained(folder)


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
    """Every assistant turn with its end-of-turn token; no user text, no header, no white space after the end."""
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
    ids, weights = renderer_of(folder).chat(chat(turns), [1.0, 1.0], 1000)
    assert ids == answer["input_ids"]
    assert [int(weight > 0) for weight in weights] == answer["assistant_masks"]


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content"])
def test_turns_whose_reasoning_the_template_drops_later_are_learned_one_by_one(tmp_path, field):
    """Earlier turns lose their reasoning in the rendering. Learned like that, they would teach to answer without it."""
    template = THINKING.replace("{%- set reasoning = '' %}", "{%- set reasoning = m.reasoning_content or '' %}")
    renderer = renderer_of(write_model(tmp_path, template))
    turns = [dict(turn) for turn in TURNS]
    for turn, reasoning in ((turns[1], "because"), (turns[3], "reason")):
        if field == "content":
            turn["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn['content'].strip()}"
        else:
            turn |= {field: reasoning, "content": turn["content"].strip()}
    with pytest.raises(RequestError, match="message 1: the chat template does not show its reasoning"):
        learned(renderer, turns)
    body = SampleBody(messages=[Message(**turn) for turn in turns])
    sequences = Intake(renderer, Limits(400, 400), Truncate.refuse).sequences(body, "")
    texts = [
        "".join(renderer.decode([token for token, weight in zip(s.token_ids, s.weights, strict=True) if weight]))
        for s in sequences
    ]
    assert texts == [
        "<think>\nbecause\n</think>\n\nI am fine, thanks.<|im_end|>",
        "<think>\nreason\n</think>\n\nthe answer\nis 42.<|im_end|>",
    ]


def test_weights_per_message(tmp_path):
    """A weight scales its own turn's tokens; 0 makes it context."""
    renderer = renderer_of(write_model(tmp_path))
    _, values = renderer.chat(chat(TURNS), [0.0, 0.5], 1000)
    assert set(values) == {0.0, 0.5}
    first = next(index for index, value in enumerate(values) if value)
    assert renderer._tokenizer.decode(
        renderer.chat(chat(TURNS), [0.0, 0.5], 1000)[0][first:], skip_special_tokens=False
    ) == (" the answer\nis 42. <|im_end|>\n")


def test_an_unsupported_template_is_refused(tmp_path):
    """A template whose beginning depends on its end is refused with the reason, not guessed."""
    with pytest.raises(RequestError, match="cannot be located exactly") as error:
        learned(renderer_of(write_model(tmp_path, COUNTING)), TURNS)
    assert error.value.field == "messages"


def test_a_templates_own_refusal_is_a_request_error(tmp_path):
    """raise_exception of a template becomes a 4xx with its text."""
    renderer = renderer_of(write_model(tmp_path, INST))
    with pytest.raises(RequestError, match="no role system"):
        learned(renderer, [{"role": "system", "content": "x"}, *TURNS])


def test_templates_run_in_a_sandbox(tmp_path):
    """A template cannot reach Python's internals."""
    renderer = renderer_of(write_model(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(RequestError, match="refused"):
        learned(renderer, TURNS)


def test_no_template_no_tokenizer(tmp_path):
    """Without a chat template messages are refused, text is not; without the server's tokenizer there is no renderer."""
    renderer = renderer_of(write_model(tmp_path / "a", None))
    with pytest.raises(RequestError, match="no chat template"):
        learned(renderer, TURNS)
    assert renderer.text("Hello", append_eos=True)[0][-1] == renderer.eos_id
    with pytest.raises(ConfigError, match="did not say which tokenizer"):
        Renderer(Serving(), tmp_path / "a")
    with pytest.raises(ConfigError, match="--skip-tokenizer-init"):
        Renderer(Serving(text_refusal="--skip-tokenizer-init"), tmp_path / "a")
    intake = Intake("--skip-tokenizer-init", Limits(400, 400), Truncate.refuse)
    with pytest.raises(RequestError, match="text: got text, but --skip-tokenizer-init, expected token ids"):
        intake.sample(SampleBody(text="x"), "")
    assert intake.sample(SampleBody(context_ids=[1], continuation_ids=[2]), "").token_ids == [1, 2]


def test_only_the_tokenizer_that_the_server_wrote_is_read(tmp_path):
    """The record and the file may be of two servers."""
    model = write_model(tmp_path)
    serving = publish_folder(model, tmp_path)
    assert (tmp_path / TOKENIZER_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / TOKENIZER_FILE).write_bytes((tmp_path / TOKENIZER_FILE).read_bytes() + b" ")
    with pytest.raises(ConfigError, match="got another content than the server wrote"):
        Renderer(serving, tmp_path)
    (tmp_path / TOKENIZER_FILE).unlink()
    with pytest.raises(ConfigError, match="expected the server's tokenizer"):
        Renderer(serving, tmp_path)


def test_the_servers_own_template_and_tokenizer_count(tmp_path):
    """vLLM's --chat-template: the template and the tokenizer of the model's folder are not those that are served."""
    model = write_model(tmp_path / "model", INST)
    renderer = renderer_of(model, chat=ChatTemplate(text=MARKED))
    marked = AutoTokenizer.from_pretrained(write_model(tmp_path / "marked", MARKED))
    turns, ids = learned(renderer, TURNS)
    assert ids == marked.apply_chat_template(TURNS, return_dict=False)
    assert turns[0] == "I am fine, thanks.<|im_end|>"
    serving = publish_folder(write_model(tmp_path / "other", vocab_size=300), tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert learned(Renderer(serving, tmp_path), TURNS)[1] == reference.apply_chat_template(TURNS, return_dict=False)


def test_a_turn_over_parts_that_later_messages_change_is_located(tmp_path):
    """The mark is added to its last part."""
    template = THINKING.replace("m.content", "(m.content | map(attribute='text') | join)")
    model = write_model(tmp_path / "m", THINKING)
    strings, parts = renderer_of(model), renderer_of(model, chat=ChatTemplate(text=template, parts=True))
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\n</think>\n\nI am fine"}, *TURNS[2:]]
    assert learned(parts, turns) == learned(strings, turns)
    empty = [TURNS[0], {"role": "assistant", "content": []}, *TURNS[2:]]
    with pytest.raises(RequestError, match="an empty assistant message to learn"):
        learned(parts, empty)


def test_a_turn_that_only_calls_tools_is_located(tmp_path):
    """OpenAI's usual round. The mark follows the last call's name: after an empty content it would change the text."""
    renderer = renderer_of(write_model(tmp_path, THINKING_CALLS))
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


def test_turns_of_weight_0_need_not_be_located(tmp_path):
    """Where the generation prompt begins with text that earlier turns do not keep, the last turn can still be learned, and
    the error says so."""
    renderer = renderer_of(write_model(tmp_path, PROMPTED))
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
    expected = learned(renderer_of(write_model(tmp_path / "plain", plain)), TURNS)
    forms = renderer_of(write_model(tmp_path / "forms", MARKED.replace("{% generation", "{%+ generation")))
    assert learned(forms, TURNS)[1] == expected[1]
    assert learned(forms, TURNS)[0] == expected[0]
    trimmed = MARKED.replace("{% generation %}", "{% set t %}{% generation %}  ").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ t | trim }}"
    )
    with pytest.raises(RequestError, match="depends on its own marks"):
        learned(renderer_of(write_model(tmp_path / "trimmed", trimmed)), TURNS)


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
    renderer = renderer_of(write_model(tmp_path, CHATML + "{{ " + expression + " }}"))
    with pytest.raises(RequestError, match="the chat template refused them"):
        learned(renderer, TURNS, chat_template_kwargs={"x": 0})


def test_special_tokens_are_those_of_the_server(tmp_path):
    """Which may have them from its tokenizer's class, or from an option."""
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_start|>"}
    renderer = renderer_of(write_model(tmp_path, INST), special_tokens=tokens)
    assert learned(renderer, TURNS)[0][0].endswith("thanks.<|im_start|>")
    assert learned(renderer, TURNS)[1][0] == renderer._tokenizer.token_to_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        (
            {"chat_refusal": "vLLM renders them by X"},
            "got a conversation, but vLLM renders them by X, expected prompt",
        ),
        ({"chat": ChatTemplate(text="{% for %}")}, "a template with an error"),
        ({"chat": None}, "the served model has no chat template"),
    ],
)
def test_a_server_that_renders_otherwise_takes_no_messages(tmp_path, serving, message):
    """And takes everything else."""
    renderer = renderer_of(write_model(tmp_path), **serving)
    with pytest.raises(RequestError, match=message) as error:
        learned(renderer, TURNS)
    assert error.value.field == "messages"
    assert renderer.text("Hello", append_eos=True)[0]


def test_the_mark_of_turns_cannot_be_smuggled_in(tmp_path):
    """In a message, or in the template's other variables."""
    renderer = renderer_of(write_model(tmp_path))
    for turns, options in (
        ([TURNS[0] | {"content": MARK}, TURNS[1]], {}),
        (TURNS, {"chat_template_kwargs": {"x": [MARK]}}),
    ):
        with pytest.raises(RequestError, match="own mark"):
            learned(renderer, turns, **options)
