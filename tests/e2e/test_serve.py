"""``apollo-tp serve``: one command serves a model and trains it, saves what would be lost, and ends both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.demo_model import make_model, standard_library_text
from tests.support.processes import free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
START_SECONDS = 240.0


def _line(log: Path, pattern: str, process: subprocess.Popen[bytes], seconds: float) -> str:
    """What the pattern's group has matched in the log, once it is there."""
    deadline = time.monotonic() + seconds
    while not (found := re.search(pattern, log.read_text(errors="replace"))):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    return found[1]


def test_one_command_serves_and_trains(tmp_path: Path) -> None:
    """At TP = 2 on a machine with one NUMA node, where vLLM alone needs an environment variable."""
    make_model(tmp_path / "model", standard_library_text(200, 30), num_layers=1)
    tmp_path.chmod(0o700)
    log, port, before = tmp_path / "log", free_port(), set(os.listdir("/proc"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "APOLLO_TP_"))}
    environment |= {
        "APOLLO_TP_RUNTIME_DIR": str(tmp_path), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "apollo_tp.cli.main", "serve", str(tmp_path / "model"), "--tensor-parallel-size", "2",
        "--port", str(port), "--host=127.0.0.1", "--max-model-len", "256", "--enforce-eager",
        "--served-model-name", "demo",
        "--", "service.http.port=0", f"service.state_dir={tmp_path}/service", f"checkpoint.dir={tmp_path}/checkpoints",
        "optim.lr=1e-3", "train.threads=1", "train.max_sequence_tokens=256",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = _line(log, r"training .* and (http://\S+),", process, START_SECONDS)
        body = {"samples": [{"context_ids": [5], "continuation_ids": [6, 7, 8]}], "epochs": 2, "wait": True}
        job = httpx.post(f"http://127.0.0.1:{port}/train", json=body, timeout=120).raise_for_status().json()
        assert (job["state"], job["step"]) == ("succeeded", 2)
        assert httpx.get(f"{address}/train/status", timeout=30).json()["unsaved"]
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(90)
    saved = re.search(r"saved: (\S+)", log.read_text())
    assert saved is not None, log.read_text()[-3000:]
    assert json.loads((Path(saved[1]) / "config.json").read_text())["architectures"]
    left = [pid for pid in set(os.listdir("/proc")) - before if pid.isdecimal() and str(tmp_path) in _command(pid)]
    assert not left


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
