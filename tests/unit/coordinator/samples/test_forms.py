"""Absent fields, other formats whose meaning is unambiguous, and files that are no lines of JSON."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
import zlib

import pytest

from apollo_tp.coordinator.jobs.job import Truncate
from apollo_tp.coordinator.samples.body import read_body
from apollo_tp.coordinator.samples.forms import read_line, read_sample
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.lines import MAX_SAMPLE_BYTES, numbered_lines
from apollo_tp.coordinator.samples.schema import PreferenceLine, SampleBody, TrainBody
from apollo_tp.errors import RequestError
from tests.support.chat_model import write_model
from tests.support.served_model import renderer_of

ASKED, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = {"messages": [ASKED, ANSWER]}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
NULLS = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning", "name", "weight"))


def read(value, kind=SampleBody):
    return read_sample(json.dumps(value).encode(), kind)


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [ASKED, ANSWER | NULLS]},
        {"messages": [ASKED | NULLS | {"tool_call_id": None}, ANSWER | {"annotations": [], "audio": {}, "id": ""}]},
        PLAIN | {"functions": None, "tools": None, "prompt": None, "text": None, "weight": None, "append_eos": None},
        PLAIN | {"functions": [], "function_call": "", "anything": {}},
        {
            "messages": [
                ASKED,
                ANSWER | {"provider_specific_fields": {"refusal": None, "x": [{}]}, "audio": {"id": None}},
            ]
        },
        PLAIN | {"context_ids": None, "continuation_ids": None, "chat_template_kwargs": None, "samples": None},
    ],
)
def test_null_and_empty_fields_are_absent(value):
    """A server's answer as the SDK writes it, and tables with a column for every field."""
    sample = read(value)
    assert (
        sample == read(PLAIN) or sample.messages == read({"messages": [ASKED, ANSWER | {"tool_calls": None}]}).messages
    )
    assert (sample.weight, sample.append_eos) == (1.0, True)
    assert read(value, TrainBody).messages == sample.messages
    sides = {
        "preferred_output": [value["messages"][1]],
        "non_preferred_output": [ANSWER | {"content": "b", "audio": None}],
    }
    pair = read({"input": {"messages": [ASKED | NULLS], "tools": None, "x": None}, "y": []} | sides, PreferenceLine)
    assert pair.preferred_output == [read(PLAIN).messages[1]]


def test_empty_forms_beside_another_are_absent(tmp_path):
    """Rows of a table whose columns are of several forms; an empty form alone is refused as itself."""
    intake = Intake(renderer_of(write_model(tmp_path)), Limits(400, 64), Truncate.refuse)
    empty = {
        "messages": [],
        "prompt": "",
        "completion": "",
        "text": "",
        "context_ids": [],
        "continuation_ids": [],
        "tools": [],
    }
    for given in (
        PLAIN,
        {"text": "x"},
        {"prompt": "x", "completion": "y"},
        {"context_ids": [1], "continuation_ids": [2]},
    ):
        assert intake.sequences(read(empty | given), "") == intake.sequences(read(given), "")
    for field, value in (("messages", []), ("text", ""), ("completion", ""), ("continuation_ids", [])):
        with pytest.raises(RequestError) as error:
            intake.sequences(read({field: value, "append_eos": False}), "")
        assert error.value.field == field


@pytest.mark.parametrize(
    ("value", "field", "got"),
    [
        ({"messages": [ASKED, ANSWER | {"audio": {"id": "x"}}]}, "messages[1].audio", "unknown field"),
        ({"messages": [ASKED, ANSWER | {"audio": None, "x": 0}]}, "messages[1].x", "unknown field"),
        ({"messages": [ASKED, ANSWER | {"x": {"y": [None, {"z": False}]}}]}, "messages[1].x", "unknown field"),
        ({"messages": [ASKED, ANSWER | {"content": 1, "audio": None}]}, "messages[1].content", "int"),
        (PLAIN | {"functions": [{"name": "w"}]}, "functions", "unknown field"),
        ({"item": {"input": [0]}}, "item", "unknown field"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen", "unknown field"),
    ],
)
def test_other_unknown_fields_are_refused_by_name(value, field, got):
    """With what is accepted."""
    with pytest.raises(RequestError) as error:
        read_sample(json.dumps(value).encode(), SampleBody, "samples[3].")
    assert error.value.field == f"samples[3].{field}"
    assert got in error.value.got
    assert error.value.expected


@pytest.mark.parametrize(
    ("kind", "value", "field", "expected"),
    [
        (
            SampleBody,
            {"messages": [ASKED, ANSWER | {"thinking": "x"}]},
            "messages[1].thinking",
            "tool_calls, tool_call_id",
        ),
        (TrainBody, PLAIN | {"warmup": 1}, "warmup", "messages; prompt"),
        (PreferenceLine, {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [ANSWER]}, "prompt", "preferred_output"),
        (SampleBody, {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen", "preferred_output"),
        (PreferenceLine, {"input": {"messages": [ASKED], "system": "x"}}, "input.system", "messages, tools"),
    ],
)
def test_a_refusal_of_a_field_names_those_that_are_known(kind, value, field, expected):
    """Of the object that it is in, or the form that is meant."""
    with pytest.raises(RequestError, match=f"expected .*{expected}") as error:
        read(value, kind)
    assert error.value.field == field
    assert expected in error.value.expected


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (json.dumps(PLAIN).encode("utf-16"), "UTF-16 text"), (gzip.compress(b"{}", mtime=0), "a gzip archive"),
        (b'{"text": "a"}\n{"text": "b"}', "more than one object"), (b'[{"text": "a"}]', "array"), (b"null", "null"),
        (b'{"text": "a"} x', "malformed JSON"),
    ],
)  # fmt: skip
def test_a_body_of_another_kind_is_named(body, got):
    """With where its samples belong; a byte order mark is taken."""
    with pytest.raises(
        RequestError, match=f"body: got {got}.*, expected .*object, several samples in its field 'samples'"
    ):
        read_body(body, TrainBody, 10)
    marked = b"\xef\xbb\xbf" + json.dumps({"samples": [PLAIN]}).encode()
    assert [sample.messages for sample in read_body(marked, TrainBody, 10)[1]] == [read(PLAIN).messages]


def test_two_system_messages_of_a_conversation_are_refused():
    """One beside the turns and one among them: which one counts?"""
    for turn in ({"from": "system", "value": "s"}, {"role": "system", "content": "s"}):
        with pytest.raises(RequestError, match="system: got it beside a system message"):
            read({"system": "t", "conversations": [turn, *SHAREGPT]})


def test_lines_of_the_other_method_are_refused_with_it():
    """A pair in a supervised file, and the reverse."""
    pair = {"input": {"messages": [ASKED]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}
    with pytest.raises(RequestError, match="input: got an unknown field, expected it only in files for method 'dpo'"):
        read(pair)
    with pytest.raises(RequestError) as error:
        read(PLAIN, PreferenceLine)
    assert "method 'dpo'" in error.value.expected or "unknown field" in error.value.got


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"conversations": SHAREGPT}, [ASKED, ANSWER]),
        ({"conversations": SHAREGPT, "id": None, "tools": []}, [ASKED, ANSWER]),
        (
            {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]},
            [{"role": "system", "content": "s"}, ASKED, ANSWER],
        ),
        ({"system": "s", "conversations": SHAREGPT}, [{"role": "system", "content": "s"}, ASKED, ANSWER]),
        ({"conversations": [ASKED, ANSWER]}, [ASKED, ANSWER]),
        (
            {"conversation": [*SHAREGPT, SHAREGPT[0], SHAREGPT[1] | {"weight": 0.5}]},
            [ASKED, ANSWER, ASKED, ANSWER | {"weight": 0.5}],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, [ASKED, ANSWER]),
        ({"instruction": "q", "output": "a", "history": [], "system": ""}, [ASKED, ANSWER]),
        (
            {"instruction": "q", "input": None, "output": "a", "system": "s"},
            [{"role": "system", "content": "s"}, ASKED, ANSWER],
        ),
        ({"prompt": [ASKED], "completion": [ANSWER]}, [ASKED, ANSWER]),
        ({"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER]}, [ASKED, ANSWER | {"weight": 0}, ASKED, ANSWER]),
    ],
)
def test_other_formats_become_messages(value, messages):
    """Those of ShareGPT, Alpaca and TRL, in files and in requests."""
    assert read(value).messages == read({"messages": messages}).messages
    assert read(value | {"epochs": 2}, TrainBody).messages == read({"messages": messages}).messages


@pytest.mark.parametrize(
    ("value", "field", "cure"),
    [
        (
            {"conversations": [{"from": "observation", "value": "x"}, *SHAREGPT]},
            "conversations[0].from",
            "messages with tools",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "conversations[0].from", "one of"),
        ({"conversations": ["hello"]}, "conversations[0]", "'from', 'value'"),
        ({"conversations": "hello"}, "conversations", "'from', 'value'"),
        ({"instruction": "q", "input": "i", "output": "a"}, "input", "messages"),
        ({"instruction": "q"}, "output", "instruction and output"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "history", "messages"),
    ],
)
def test_ambiguous_forms_of_other_formats_are_refused(value, field, cure):
    """With what to send instead."""
    with pytest.raises(RequestError, match=cure) as error:
        read_sample(json.dumps(value).encode(), SampleBody, "samples[1].")
    assert error.value.field == f"samples[1].{field}"


def archive():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a.jsonl", "{}")
    return packed.getvalue()


LINE = json.dumps(PLAIN | {"text": "é"}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (LINE.encode("utf-16"), "UTF-16"), (LINE.encode("utf-16-le"), "UTF-16"), (LINE.encode("utf-16-be"), "UTF-16"),
        (LINE.encode("utf-32"), "UTF-32"), (gzip.compress(LINE.encode(), mtime=0), "gzip"), (archive(), "zip"),
        (bz2.compress(LINE.encode()), "bzip2"), (lzma.compress(LINE.encode()), "xz"), (b"PAR1\x15\x00", "Parquet"),
        (b"\x28\xb5\x2f\xfd\x00", "zstd"), (json.dumps([PLAIN]).encode(), "JSON array"),
        (json.dumps([PLAIN], indent=1).encode(), "JSON array"), (json.dumps(PLAIN, indent=2).encode(), "pretty-printed"),
        (b'{"messages": [\n{"role": "user", "content": "x"}\n]}', "pretty-printed"), (b"prompt,completion\na,b\n", "CSV"),
        (b"prompt\tcompletion\na\tb\n", "CSV"), (b"prompt;completion\na;b\n", "CSV"), (b"text\nabc\n", "no JSON object"),
        (b"- messages:\n", "no JSON object"), (b"<!DOCTYPE html>\n", "no JSON object"), (b"null\n", "no JSON object"),
        (json.dumps(LINE).encode(), "no JSON object"), (zlib.compress(LINE.encode()), "no JSON object"),
        (b"\x80\x04\x95", "no JSON object"), (b"PK\x05\x06" + bytes(18), "zip"), (b"7z\xbc\xaf\x27\x1c", "7z archive"),
        (b"\x93NUMPY\x01", "NumPy"), (bytes(9), "binary"), ("[1]".encode("utf-16-le"), "UTF-16"),
        ("[1]".encode("utf-16-be"), "UTF-16"), (LINE.encode("utf-32-le"), "UTF-32"), (LINE.encode("utf-32-be"), "UTF-32"),
        (b'{"messages":\n[]}', "pretty-printed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)  # fmt: skip
def test_files_of_another_kind_are_named(content, kind):
    """In the words of their kind, with what is expected."""
    with pytest.raises(RequestError, match=f"line 1: got .*{kind}.*, expected one object in UTF-8 per line"):
        list(numbered_lines(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (LINE.encode("cp1252"), r"a byte that is not UTF-8 \(0xe9"), (LINE.encode() + b",", "a comma after the object"),
        (str(PLAIN).encode(), "single quotes"), (LINE.encode() + b"\r" + LINE.encode(), "more than one object"),
        (b'{"text": "x", "weight": NaN}', "NaN"), (b'{"text": "x", "weight": -Infinity}', "Infinity"), (b"\x1a", "Ctrl-Z"),
    ],
)  # fmt: skip
def test_known_mistakes_in_a_line_are_named(line, kind):
    """Instead of the parser's position alone."""
    with pytest.raises(RequestError, match=f"got .*{kind}.*expected one object in UTF-8 per line"):
        read_line(line, SampleBody)


def test_a_byte_order_mark_and_blank_lines_are_taken():
    """Azure's guide asks for the mark; numbers are those of the file."""
    content = b"\xef\xbb\xbf\r\n" + LINE.encode() + b"\r\n\n  \n" + LINE.encode()
    assert [number for number, _ in numbered_lines(io.BytesIO(content))] == [2, 5]
    marked = b"\xef\xbb\xbf" + LINE.encode() + b"\n"
    for content in (marked, b"\xef\xbb\xbf" + marked, b"\xef\xbb\xbf\n" + marked, marked * 3):  # as joined files
        assert {line for _, line in numbered_lines(io.BytesIO(content))} == {LINE.encode() + b"\n"}
    with pytest.raises(RequestError, match="line 2: got UTF-16 text"):
        list(numbered_lines(io.BytesIO(("\n" + LINE).encode("utf-16-le"))))


def test_a_line_that_is_too_long_is_not_read(tmp_path):
    """It is refused by its number."""
    lines = numbered_lines(io.BytesIO(b'{"text": "x"}\n{"text": "' + b"x" * MAX_SAMPLE_BYTES + b'"}\n'))
    assert next(lines)[0] == 1
    with pytest.raises(RequestError, match=f"line 2: got a line of more than {MAX_SAMPLE_BYTES} bytes"):
        next(lines)
