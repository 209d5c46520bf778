"""An engine without an API server (vllm.LLM): its first worker says which tokenizer it uses."""

import json
import sys

import pytest

from tests.support.processes import ManagedProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_the_ids_are_those_that_it_serves(tmp_path):
    """Before its manifest, for which a trainer waits; of the tokenizer that it was told to use."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {
        "VLLM_PLUGINS": "apollo", "APOLLO_TP_RUNTIME_DIR": str(tmp_path / "runtime"), "APOLLO_TP_INSTANCE": "plain",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    engine = ManagedProcess(
        [sys.executable, "-m", "tests.support.plain_engine", str(tmp_path)], environment, tmp_path / "log"
    )
    try:
        assert engine.process.wait(300) == 0, engine.tail()
    finally:
        engine.stop()
    served, trained = json.loads(next(line for line in engine.log.read_text().splitlines() if line.startswith("[[")))
    assert served
    assert trained == served
