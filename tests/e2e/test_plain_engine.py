"""An engine without an API server (vllm.LLM): its first worker says which tokenizer it uses."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_the_ids_are_those_that_it_serves(tmp_path):
    """Before its manifest, for which a trainer waits; of the tokenizer that it was told to use."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = os.environ | {
        "VLLM_PLUGINS": "apollo", "APOLLO_TP_RUNTIME_DIR": str(tmp_path / "runtime"), "APOLLO_TP_INSTANCE": "plain",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.support.plain_engine", str(tmp_path)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=300).stdout
    served, trained = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("[[")))
    assert served
    assert trained == served
