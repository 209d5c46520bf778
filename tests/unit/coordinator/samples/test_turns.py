"""What an assistant message says is learned completely, up to its end and no further; or the sample is refused."""

import time

import pytest

from apollo_tp.coordinator.jobs.job import Truncate
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.long_conversation import MAX_RENDERED
from apollo_tp.coordinator.samples.schema import Message, Preference, PreferenceLine, SampleBody
from apollo_tp.coordinator.samples.template import Template
from apollo_tp.errors import RequestError
from apollo_tp.shards.serving import ChatTemplate
from tests.support.chat_model import (
    CALLING,
    CHATML,
    DROPPING_ALWAYS,
    DROPPING_ALWAYS_PLAIN,
    INST,
    MARKED,
    PROMPTED,
    PROMPTED_CALLS,
    THINKING,
    THINKING_CALLS,
    TURNS,
    tool_round,
    write_model,
)
from tests.support.rendered_chats import SEEN
from tests.support.served_model import renderer_of

QUESTION = {"role": "user", "content": "weather?"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "A"}'}}
ALWAYS = CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")


def intake_of(folder, template=CHATML, truncate=Truncate.refuse, tokens=400, **served):
    return Intake(renderer_of(write_model(folder, template), **served), Limits(400, tokens), truncate)


def body(*messages, **other):
    return SampleBody(messages=[Message(**message) for message in messages], **other)


def learned(intake, sample):
    """The text of the learned tokens of each sequence."""
    return [
        "".join(intake._renderer.decode([t for t, w in zip(s.token_ids, s.weights, strict=True) if w]))
        for s in intake.sequences(sample, "")
    ]


@pytest.mark.parametrize(
    ("message", "field", "cure"),
    [
        ({"content": "", "function_call": {"name": "w", "arguments": "{}"}}, "function_call", "tool_calls"),
        ({"content": "Let me look.", "function_call": {"name": "w", "arguments": "{}"}}, "function_call", "tool_calls"),
        ({"function_call": {"name": "w", "arguments": "{}"}}, "function_call", "tool_calls"),
        ({"content": "", "refusal": "I cannot."}, "refusal", "content"),
        ({"content": None, "refusal": "I cannot."}, "refusal", "content"),
        ({"content": "x", "refusal": "I cannot."}, "refusal", "content"),
        ({"content": ""}, "content", "weight 0"),
        ({"content": [{"type": "text", "text": " \n"}], "weight": 2}, "content", "weight 0"),
        ({"content": "x", "tool_call_id": "1"}, "tool_call_id", "'tool'"),
        ({"content": "x", "reasoning": "a", "reasoning_content": "b"}, "reasoning_content", "one of them"),
    ],
)
def test_what_no_template_is_given_is_refused(tmp_path, message, field, cure):
    """The turn without it would be learned: mostly an empty one."""
    with pytest.raises(RequestError, match=cure) as error:
        intake_of(tmp_path).sequences(body(QUESTION, {"role": "assistant"} | message), "")
    assert error.value.field == f"messages[1].{field}"


def test_a_call_of_nothing_is_no_call(tmp_path):
    """Libraries write every field of an answer."""
    empty = {"function_call": {"name": None, "arguments": ""}, "refusal": ""}
    assert learned(intake_of(tmp_path), body(QUESTION, TURNS[1] | empty)) == ["I am fine, thanks.<|im_end|>"]


def test_fields_of_another_role_are_refused(tmp_path):
    """vLLM leaves them out."""
    for field, value in (
        ("tool_calls", [CALL]),
        ("reasoning", "so"),
        ("reasoning_content", "so"),
        ("tool_call_id", "1"),
    ):
        with pytest.raises(RequestError) as error:
            intake_of(tmp_path).sequences(body(QUESTION | {field: value}, TURNS[1]), "")
        assert error.value.field == f"messages[0].{field}"


@pytest.mark.parametrize("template", [CHATML, MARKED, INST], ids=["chatml", "marked", "inst"])
@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"content": None, "tool_calls": [CALL]}, "tool calls"),
        ({"content": "Let me look.", "tool_calls": [CALL]}, "tool calls"),
        ({"content": "Hot.", "reasoning": "It is summer."}, "reasoning"),
        ({"content": "Hot.", "reasoning_content": "It is summer."}, "reasoning"),
    ],
)
def test_what_the_template_does_not_show_is_refused(tmp_path, template, message, what):
    """Wherever the turn is, if it is to be learned. As context it is what the server makes of it."""
    intake, turn = intake_of(tmp_path, template), {"role": "assistant"} | message
    for messages in ([QUESTION, turn], [QUESTION, turn, *TURNS]):
        with pytest.raises(RequestError, match=f"message 1: the chat template does not show its {what}"):
            intake.sequences(body(*messages), "")
    assert len(intake.sequences(body(QUESTION, turn | {"weight": 0}, *TURNS), "")) == 1


def test_arguments_that_the_template_does_not_show_are_refused(tmp_path):
    """This one shows the names of functions alone."""
    with pytest.raises(RequestError, match="does not show its tool calls' arguments"):
        intake_of(tmp_path, THINKING_CALLS).sequences(body(QUESTION, {"role": "assistant", "tool_calls": [CALL]}), "")


@pytest.mark.parametrize("template", [CALLING, SEEN], ids=["calling", "seen"])
def test_what_the_template_shows_in_its_own_way_is_learned(tmp_path, template):
    """As JSON, for example, with escapes in it."""
    asked = {"role": "assistant", "content": 'say "x"\n', "tool_calls": [CALL]}
    (text,) = learned(intake_of(tmp_path, template), body(QUESTION, asked))
    assert '"city": "A"' in text


def test_pairs_that_become_the_same_are_refused(tmp_path):
    """Their difference teaches nothing: equal answers, or a template that does not show where they differ."""
    intake = intake_of(tmp_path)

    def pair(preferred, rejected, intake=intake):
        line = PreferenceLine(
            input=Preference(messages=[Message(**QUESTION)]),
            preferred_output=[Message(role="assistant", **preferred)],
            non_preferred_output=[Message(role="assistant", **rejected)],
        )
        return intake.pair(line)

    with pytest.raises(RequestError, match="the same tokens as for preferred_output"):
        pair({"content": "yes"}, {"content": "yes"})
    with pytest.raises(RequestError, match="the same tokens"):  # trimmed by the template
        pair({"content": "yes"}, {"content": "yes "}, intake_of(tmp_path / "inst", INST))
    cut = intake_of(tmp_path / "cut", truncate=Truncate.right, tokens=24)
    with pytest.raises(RequestError, match="the same tokens"):  # they differ behind the cut
        pair({"content": "x" * 30 + "a"}, {"content": "x" * 30 + "b"}, cut)
    other = CALL | {"function": {"name": "f", "arguments": '{"city": "B"}'}}
    with pytest.raises(RequestError, match="does not show its tool calls"):
        pair({"tool_calls": [CALL]}, {"tool_calls": [other]})
    shown = pair({"tool_calls": [CALL]}, {"tool_calls": [other]}, intake_of(tmp_path / "calls", CALLING))
    assert shown.preferred != shown.rejected
    assert pair({"content": "yes"}, {"content": "no"}).preferred.token_ids
    with pytest.raises(RequestError, match="the same tokens"):
        pair({"content": "yes", "weight": 1}, {"content": "yes", "weight": 0.5})


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ALWAYS, "<|im_end|>"),
        (INST.replace("eos_token", "eos_token + ''"), "<|im_end|>"),
        (INST.replace(" + eos_token", ""), ""),
    ],
    ids=["always", "none and an end", "none and no end"],
)
def test_a_turn_ends_before_a_generation_prompt_that_nobody_asked_for(tmp_path, template, end):
    """Templates that add the next header, whatever add_generation_prompt is, and those that have none."""
    intake = intake_of(tmp_path, template)
    assert [text.strip() for text in learned(intake, body(*TURNS[:2]))] == [f"I am fine, thanks.{end}"]
    last = [text.strip() for text in learned(intake, body(*TURNS))][-1]
    assert last.endswith((f"the answer\nis 42.{end}", f"the answer\nis 42. {end}"))
    echo = [QUESTION | {"content": "[/INST]"}, {"role": "assistant", "content": "[/INST]"}]
    assert [text.strip() for text in learned(intake, body(*echo))] == [f"[/INST]{end}"]


BEFORE_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
NEXT_HEADERS = {
    "the prompt, not asked for": CHATML.replace("if add_generation_prompt", "if not add_generation_prompt"),
    "the user's": BEFORE_PROMPT + "{% if messages[-1].role != 'user' %}{{ '<|im_start|>user\n' }}{% endif %}",
    "the prompt after any answer": CHATML.replace("if add_generation_prompt", "if add_generation_prompt or "
                                                  "messages[-1].role == 'assistant'"),
    "a footer": BEFORE_PROMPT + "{% if messages[-1].role != 'user' %}{{ 'Be brief.<|im_end|>\n' }}{% endif %}",
    "after dropped reasoning": DROPPING_ALWAYS.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}"),
}  # fmt: skip
"""Templates that add more than the turn after an answer, in ways that do not show in the rendering before it."""


@pytest.mark.parametrize("name", NEXT_HEADERS)
def test_nothing_after_the_token_at_which_the_server_stops_is_learned(tmp_path, name):
    """The model would generate the next turn's header, which the server never shows."""
    intake = intake_of(tmp_path, NEXT_HEADERS[name])
    answer = "<think>\nso\n</think>\n\nthanks" if "reasoning" in name else "I am fine"
    for turns in ([QUESTION], [QUESTION, {"role": "assistant", "content": answer}, QUESTION]):
        for text in learned(intake, body(*turns, {"role": "assistant", "content": answer})):
            assert text.endswith(f"{answer.removeprefix('<think>' + chr(10))}<|im_end|>")


def test_a_stop_token_that_the_message_itself_has_ends_nothing(tmp_path):
    """It is what was asked for."""
    said = {"role": "assistant", "content": "I am<|im_end|> fine"}
    assert learned(intake_of(tmp_path), body(QUESTION, said)) == ["I am<|im_end|> fine<|im_end|>"]


@pytest.mark.parametrize("template", [PROMPTED, PROMPTED_CALLS], ids=["answers", "calls"])
def test_reasoning_with_the_tag_that_the_prompt_begins_is_learned(tmp_path, template):
    """As Qwen3.5: a client has the tag in the content, or has not since the server's prompt had it."""
    intake = intake_of(tmp_path, template)
    for content in ("<think>\nso\n</think>\n\nb", "so\n</think>\n\nb"):
        said = {"role": "assistant", "content": content}
        assert learned(intake, body(QUESTION, said)) == ["so\n</think>\n\nb<|im_end|>"]
        assert learned(intake, body(QUESTION, said, QUESTION, said)) == ["so\n</think>\n\nb<|im_end|>"] * 2


def test_a_turn_without_end_before_a_generation_prompt_is_refused(tmp_path):
    """Where the header begins cannot be told."""
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: "
    with pytest.raises(RequestError, match="without a token that closes the turn"):
        intake_of(tmp_path, plain).sequences(body(*TURNS[:2]), "")


@pytest.mark.parametrize("template", [DROPPING_ALWAYS, DROPPING_ALWAYS_PLAIN], ids=["prompted", "plain"])
def test_reasoning_that_the_template_always_drops_is_learned_as_it_is_generated(tmp_path, template):
    """After the generation prompt, as the server gives it; in the context earlier turns are without it, as served."""
    intake = intake_of(tmp_path, template)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nthus\n</think>\n\nd"},
    ]
    begun = "<think>\n" if template is DROPPING_ALWAYS else ""
    first, second = intake.sequences(body(*turns), "")
    texts = ["".join(intake._renderer.decode(sequence.token_ids)) for sequence in (first, second)]
    assert texts == [
        "<|im_start|><|user|>a<|assistant|><think>\nso\n</think>\n\nb<|im_end|>",
        "<|im_start|><|user|>a<|assistant|>\n\nb<|im_end|><|user|>c<|assistant|><think>\nthus\n</think>\n\nd<|im_end|>",
    ]
    answers = ["<think>\nso\n</think>\n\nb<|im_end|>", "<think>\nthus\n</think>\n\nd<|im_end|>"]
    assert learned(intake, body(*turns)) == [answer.removeprefix(begun) for answer in answers]
    assert learned(intake, body(*turns[:2])) == [answers[0].removeprefix(begun)]
    preferred, rejected = Message(**turns[3]), Message(role="assistant", content="<think>\nthus\n</think>\n\ne")
    line = PreferenceLine(
        input=Preference(messages=[Message(**turn) for turn in turns[:3]]),
        preferred_output=[preferred],
        non_preferred_output=[rejected],
    )
    assert intake.pair(line).preferred == second
    if begun:
        with pytest.raises(RequestError, match=r"beginning with '<think>\\n'"):
            intake.sequences(body(turns[0], {"role": "assistant", "content": "b"}), "")
    with pytest.raises(RequestError, match=r"send it in the content|does not show its reasoning"):
        intake.sequences(body(turns[0], {"role": "assistant", "content": "b", "reasoning": "so"}), "")


@pytest.mark.parametrize("role", ["bot", "model", "gpt", "function", "Assistant", "ipython", "x"])
def test_unknown_roles_are_refused_by_name(tmp_path, role):
    """A template that does not compare the role renders any, and the turn is not learned. Others write a role that is only
    theirs, as Gemma's 'model'."""
    template = CHATML.replace("{% for", "{% set names = {'assistant': 'model'} %}{% for")
    with pytest.raises(RequestError) as error:
        intake_of(tmp_path, template).sequences(body(QUESTION, TURNS[1], {"role": role, "content": "x"}, TURNS[1]), "")
    assert (error.value.field, error.value.got) == ("messages[2].role", repr(role))


@pytest.mark.parametrize("role", ["bot", "ai", "model", "Assistant", "assistant "])
def test_an_answer_under_another_role_is_refused_by_it(tmp_path, role):
    """Without any other answer, too: "no assistant message" would not say why."""
    with pytest.raises(RequestError, match="expected 'assistant'") as error:
        intake_of(tmp_path).sequences(body(QUESTION, {"role": role, "content": "x"}), "")
    assert error.value.field == "messages[1].role"


def test_roles_that_the_template_names_are_known(tmp_path):
    """As Llama 3.1's 'ipython'."""
    template = CHATML.replace("{% for", "{% set known = 'ipython' %}{% for")
    messages = [QUESTION, TURNS[1], {"role": "ipython", "content": "42"}, TURNS[1]]
    assert len(learned(intake_of(tmp_path, template), body(*messages))) == 1


def test_fields_of_content_parts(tmp_path):
    """What a template is not given is refused by name, also where contents are joined to one string."""
    for served in ({}, {"chat": ChatTemplate(text=SEEN, parts=True)}):
        intake = intake_of(tmp_path, **served)
        for name, value in (("weight", 0), ("weight", -1), ("cache_control", {"type": "ephemeral"}), ("x", False)):
            part = {"type": "text", "text": "x", name: value}
            with pytest.raises(RequestError) as error:
                intake.sequences(
                    body(QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "a"}, part]}), ""
                )
            assert error.value.field == f"messages[1].content[1].{name}"
        part = {"type": "text", "text": "x", "annotations": [], "cache_control": None}
        assert intake.sequences(body(QUESTION, {"role": "assistant", "content": [part]}), "")


LONG = {
    "chatml": (CHATML, TURNS[:2]),
    "thinking": (THINKING, [TURNS[0], TURNS[1] | {"content": "x "}]),
    "marked": (MARKED, TURNS[:2]),
    "inst": (INST, TURNS),
    "calls": (CALLING.replace("'\n' + m.content", "'\n' + (m.content or '')"), tool_round(*TURNS[2:])),
}


@pytest.mark.parametrize("name", LONG)
def test_long_conversations_take_linear_time(tmp_path, name, monkeypatch):
    """The same turns as if each were compared, with a number of messages rendered that is linear in them."""
    template, messages = LONG[name]
    intake, count = intake_of(tmp_path, template, tokens=10**6), []
    render = Template.render
    monkeypatch.setattr(Template, "render", lambda self, m, *a, **k: count.append(len(m)) or render(self, m, *a, **k))

    def learn(rounds):
        count.clear()
        start = time.monotonic()
        many = [m | {"content": f"{n} {m['content'] or ''}"} for n in range(rounds) for m in messages]
        sequences = intake.sequences(body(*many), "")
        return sequences, sum(count) / len(many), time.monotonic() - start

    small, _, _ = learn(60)
    monkeypatch.setattr("apollo_tp.coordinator.samples.conversation.MAX_RENDERED", 0)
    again, _, _ = learn(60)
    assert again == small
    monkeypatch.setattr("apollo_tp.coordinator.samples.conversation.MAX_RENDERED", MAX_RENDERED)
    (_,), few, _ = learn(200)
    (_,), many, seconds = learn(800)
    assert many < 1.5 * few + 5
    assert seconds < 30  # 800 turns or more


def test_a_long_conversation_that_needs_a_sequence_for_each_turn_is_refused(tmp_path):
    """All of them together have a number of tokens that is quadratic in its length."""
    intake = intake_of(tmp_path, DROPPING_ALWAYS, tokens=10**6)
    answer = {"role": "assistant", "content": "<think>\n" + "so " * 400 + "</think>" + "b " * 2000}
    start = time.monotonic()
    with pytest.raises(RequestError, match="50 turns, each of which needs a sequence of its own"):
        intake.sequences(body(*[TURNS[0], answer] * 50), "")
    assert time.monotonic() - start < 60
