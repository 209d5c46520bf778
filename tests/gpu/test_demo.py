"""The README's demo on two GPUs; its exit status says whether its promises held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(600)]


def _figures(module: str, folder: Path) -> dict:
    extra = os.environ.get("APOLLO_TP_TEST_SERVER_ARGS", "")
    done = subprocess.run(
        [sys.executable, "-m", module, "--out", str(folder), f"--server-args={extra}"],
        capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads((folder / "result.json").read_text())


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """Loss falls by more than 2 nats, no request fails or pauses, the checkpoint is bit-identical and serves alike."""
    result = _figures("examples.demo", tmp_path / "demo")
    assert result["train_loss_first"] - result["train_loss_last"] > 2
    assert result["checkpoint_bit_identical"] is True
    assert result["inference_requests_failed"] == result["inference_pauses"] == 0


def test_two_servers_are_trained_as_one(tmp_path: Path) -> None:
    """A killed server is filled from the other, the job goes on, and no other request fails."""
    assert _figures("examples.demo.replicas", tmp_path / "demo")["filled_bit_identical"] is True
