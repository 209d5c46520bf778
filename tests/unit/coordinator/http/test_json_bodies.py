"""JSON bodies: long ones are looked through without stopping others, and hold a bounded number of values."""

import asyncio
import itertools
import json
import threading

import msgspec
import pytest

from apollo_tp.coordinator.http import bodies
from apollo_tp.coordinator.http.openai_bodies import CompleteBody, FineTuningBody, UploadBody
from apollo_tp.coordinator.samples.body import read_body
from apollo_tp.coordinator.samples.forms import read_sample
from apollo_tp.coordinator.samples.schema import (
    CheckpointBody,
    PreferenceLine,
    SampleBody,
    ScoreOptions,
    TrainBody,
    decode,
)
from apollo_tp.coordinator.samples.unique_keys import MAX_VALUES
from apollo_tp.errors import RequestError
from tests.support.stalls import longest_stall

MANY = {"objects": "{}", "texts": '"a"', "lists": "[1]", "numbers": "1"}


def body_of(value):
    """An object with very many such values, as deep as a tool's parameters are."""
    return '{"x": [[{"y": [' + ",".join([value] * (MAX_VALUES + 1)) + "]}]]}"


@pytest.mark.parametrize("value", MANY.values(), ids=MANY)
def test_very_many_values_are_refused(value):
    """In bodies of every route and in lines of files: a megabyte of them stopped the event loop for two seconds."""
    for kind in (FineTuningBody, UploadBody, CompleteBody, CheckpointBody):
        with pytest.raises(RequestError, match="values") as error:
            asyncio.run(bodies.decode_body(body_of(value).encode(), kind))
        assert (error.value.status, error.value.code) == (413, "too_many_values")
    for kind in (SampleBody, PreferenceLine):
        with pytest.raises(RequestError, match=r"samples\[7\]: got more than"):
            read_sample(body_of(value).encode(), kind, "samples[7].")


def test_a_sample_may_have_as_many_token_ids_as_the_schema_allows():
    """They are numbers, of which a body has millions."""
    ids = [1] * (2 * MAX_VALUES)
    line = json.dumps({"context_ids": ids, "continuation_ids": [2]}).encode()
    assert read_sample(line, SampleBody).context_ids == ids


def test_long_bodies_are_decoded_on_a_thread(monkeypatch):
    """While a short one is not worth that."""
    used = []
    decode = bodies._decode_body
    monkeypatch.setattr(
        bodies, "_decode_body", lambda *given: used.append(threading.current_thread()) or decode(*given)
    )
    ids = [f"part_{number}" for number in range(9_000)]
    assert asyncio.run(bodies.decode_body(json.dumps({"part_ids": ids}).encode(), CompleteBody)).part_ids == ids
    assert asyncio.run(bodies.decode_body(b'{"part_ids": ["a"]}', CompleteBody)).part_ids == ["a"]
    assert used[0] is not threading.main_thread()
    assert used[1] is threading.main_thread()


@pytest.mark.parametrize("around", [b"%s", b'{"samples"%s: [{}]}', b'{"samples": [{}%s{}]}'])
def test_others_run_while_white_space_is_skipped(around):
    """One search over all of it would keep the interpreter's lock to its end."""
    body = around % (b" " * 2**28)

    def read():
        with pytest.raises(RequestError):
            read_body(body, TrainBody, 10)

    longest, seconds = longest_stall(read)
    assert longest < max(0.1, seconds / 3)


BAD_TEXT = (b'"\xff"', b'"\xd7po"', b'[{"a": "\xc3("}]', b'{"\xfe": 1}', b'[1, "\xed\xa0\x80"]')
BODIES = (b'{"%b": %b}', b'{"samples": [{}], "%b": %b}', b'{"epochs": [], "%b": %b, "seed": {}}')


def read_all(data, kind):
    return list(read_body(data, kind, 10)[1] or ())


READERS = {
    SampleBody: [read_sample, decode], PreferenceLine: [read_sample], CheckpointBody: [decode], FineTuningBody: [decode],
    UploadBody: [decode], CompleteBody: [decode], TrainBody: [read_all], ScoreOptions: [read_all],
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
def test_text_that_is_not_utf_8_is_refused(kind):
    """In each field, whatever its type, and beside values of a wrong type, after which msgspec finds it."""
    for field in msgspec.structs.fields(kind):
        for bad, body, reader in itertools.product(BAD_TEXT, BODIES, READERS[kind]):
            with pytest.raises(RequestError):
                reader(body % (field.encode_name.encode(), bad), kind)
