"""The ids that are trained are those that vLLM serves, whatever class transformers has for it; or text is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.schema import Message, SampleBody, Truncate
from apollo_tp.errors import RequestError
from tests.support import forks
from tests.support.processes import FORKING_SERVER
from tests.support.served_model import publish_folder, renderer_of
from tests.support.tokenizer_zoo import KINDS


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/support/served_tokens.py found."""
    done = forks.run(FORKING_SERVER, ["tests.support.served_tokens", str(tmp_path_factory.mktemp("tokens"))], 240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_ids_are_those_that_vllm_serves(vllm: dict[str, Any], name: str) -> None:
    """Of texts and prompts as /v1/completions takes them, and of conversations. What a tokenizer appends to a text by
    itself (T5) is not part of a prompt that is continued."""
    kind, found = KINDS[name], vllm["kinds"][name]
    assert found["refusals"] == ["", ""]
    for text, served, ours in found["texts"]:
        assert ours == served[: len(served) - kind.appended], text
    served, ours = found["chat"]
    assert ours == served
    assert found["served stays"]  # publishing must not change what is served


@pytest.mark.parametrize("name", KINDS)
def test_turns_are_learned_with_their_end(vllm: dict[str, Any], name: str) -> None:
    """Whatever folder or class the end-of-turn token comes from, also one that includes the line break after it."""
    kind, found = KINDS[name], vllm["kinds"][name]
    assert [run.rstrip().endswith(kind.end) for run in found["learned"]] == [True, True]
    assert [run.lower().replace(" ", "").startswith(("iamfine", "theanswer")) for run in found["learned"]] == [
        True,
        True,
    ]
    assert found["eos"] == kind.config.get("eos_token", "<|im_end|>")
    assert kind.end in found["ends"]


def test_tokenizer_json_alone_would_not_do(vllm: dict[str, Any]) -> None:
    """Else the comparisons above would say nothing."""
    others = {name for name, found in vllm["kinds"].items() if found["tokenizer.json"] != found["chat"][0]}
    assert others >= {
        "llama", "code llama", "gemma", "gpt2, prefix space", "gpt neox, prefix space", "qwen2", "qwen3.5", "cohere", "t5",
        "generic, added_tokens_decoder", "generic, added_tokens.json", "generic, spells special tokens",
    }  # fmt: skip


def test_what_a_class_does_in_python_is_refused(vllm: dict[str, Any]) -> None:
    """CodeLlama's makes another form of a text with <FILL_ME>; other tokenizers have no such token."""
    assert {name: found["refused"] for name, found in vllm["kinds"].items() if found["refused"]} == {
        "code llama": ["<FILL_ME>"]
    }


def test_tokenizers_that_are_no_backend_alone_are_refused(vllm: dict[str, Any]) -> None:
    """Each with the reason; the server keeps serving."""
    expected = {
        "none": "--skip-tokenizer-init",
        "slow": "is a ByT5Tokenizer, not one of the tokenizers library",
        "own code": "encodes texts in code of its own (OwnCode._encode_plus)",
        "other ids": "makes of 'word' the ids",
        "an object": "not one of the tokenizers library",
    }
    assert all(text in vllm["refused"][name] for name, text in expected.items()), vllm["refused"]


def test_an_engine_without_an_api_server_says_it_too(vllm: dict[str, Any]) -> None:
    """That of a vllm.LLM: its worker asks vLLM for the tokenizer that the options name."""
    refusal, has_template, served, ours, mode = vllm["engines"]["tokenizer"]
    assert (refusal, has_template, mode) == ("", True, 0o600)
    assert ours == served
    assert "--skip-tokenizer-init" in vllm["engines"]["none"][0]


@pytest.mark.parametrize("name", ["llama", "qwen2, ends beside its vocabulary", "t5", "generic, added_tokens.json"])
def test_a_tokenizer_has_one_digest(vllm: dict[str, Any], tmp_path: Path, name: str) -> None:
    """In every process that publishes it: a job resumes after the server was started again."""
    record = publish_folder(Path(vllm["kinds"][name]["folder"]), tmp_path).tokenizer
    assert record is not None
    assert record.sha256 == vllm["kinds"][name]["sha256"]


def test_a_text_that_the_class_treats_apart_is_refused(tmp_path: Path) -> None:
    """In every form of sample; the same without the token is taken."""
    intake = Intake(renderer_of(KINDS["code llama"].write(tmp_path / "m")), Limits(1000, 400), Truncate.refuse)
    fill = "def f(x): <FILL_ME> return x"
    chat = [Message(role="user", content=fill), Message(role="assistant", content="x")]
    bodies = {
        "text": SampleBody(text=fill),
        "prompt": SampleBody(prompt=fill, completion="x"),
        "completion": SampleBody(prompt="x", completion=fill),
        "messages": SampleBody(messages=chat),
    }
    for field, body in bodies.items():
        with pytest.raises(RequestError, match="a text with <FILL_ME>") as error:
            intake.sample(body, "samples[1].")
        assert error.value.field == f"samples[1].{field}"
    assert intake.sample(SampleBody(text=fill.replace("<FILL_ME>", "")), "").token_ids


@pytest.mark.parametrize("name", ["llama", "llama, ends texts", "llama 3", "gemma", "qwen2", "t5", "bert"])
def test_rendered_texts_get_no_second_beginning_or_end(tmp_path: Path, name: str) -> None:
    """Whoever renders a conversation has both in it; white space after the end is part of the template."""
    kind = KINDS[name]
    renderer = renderer_of(kind.write(tmp_path / "m"), tokenizer_ends=kind.generation_ends)
    begin = "".join(renderer.decode(renderer._prefix))
    plain, eos = renderer.encode("word"), renderer.eos_id
    assert renderer.text("word", append_eos=True)[0] == [*renderer._prefix, *plain, eos]
    assert renderer.text("word", append_eos=False)[0] == [*renderer._prefix, *plain]
    for end in (kind.end, f"{kind.end}\n"):
        rendered = f"{begin}word{end}"
        assert renderer.text(rendered, append_eos=True)[0] == renderer.encode(rendered)
        ids, weights = renderer.prompt_completion(f"{begin}word", f"word{end}", append_eos=True)
        target = renderer.encode(f"word{end}")
        assert ids == renderer.encode(f"{begin}word") + target
        assert sum(weights) == len(target)
    # an end inside is none; and what the client ends its prompt with stays there
    ids, _ = renderer.prompt_completion(f"word{kind.end}", f"a{kind.end}b", append_eos=True)
    assert ids == [*renderer._prefix, *renderer.encode(f"word{kind.end}"), *renderer.encode(f"a{kind.end}b"), eos]
