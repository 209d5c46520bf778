"""A trainer started together with its server: it waits for vLLM's engine, and renders as vLLM does, whatever it was told."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx
import pytest

from apollo_tp.demo.model import make_model, standard_library_text
from apollo_tp.demo.processes import coordinator_url, free_port, start_server, start_trainer
from apollo_tp.manifest import SERVING_FILE, read_instance
from tests.e2e.conftest import START_SECONDS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TEMPLATE = (
    "{% for m in messages %}[[{{ m.role }}]]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[[assistant]]{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello import os"}, {"role": "assistant", "content": "return None"}]


def test_the_trainer_waits_for_the_engine_and_renders_as_it_does(tmp_path: Path, runtime_dir: Path) -> None:
    """vLLM's --chat-template and --tokenizer are neither in the model's folder nor known to the workers."""
    for name, files in (("model", 30), ("tokenizer", 5)):
        make_model(tmp_path / name, standard_library_text(300, files), vocab_size=1003, num_layers=1)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    options = ["--chat-template", str(tmp_path / "template.jinja"), "--tokenizer", str(tmp_path / "tokenizer")]
    port, folder = free_port(), runtime_dir / "together"
    server = start_server(
        tmp_path / "model", port, runtime_dir, tmp_path / "server.log", instance="together", extra=options
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        wait = ["server.instance=together", f"server.wait_seconds={START_SECONDS:.0f}"]
        trainer = start_trainer(runtime_dir, tmp_path, tmp_path / "trainer.log", overrides=wait)
        stack.callback(trainer.stop)
        server.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        url = coordinator_url(runtime_dir, trainer, instance="together", seconds=START_SECONDS)
        assert all(m.endpoints for m in read_instance(folder))
        ready, started = (folder / SERVING_FILE).stat().st_mtime, (folder / "coordinator_settings.json").stat().st_mtime
        assert ready < started
        body = {"model": "demo", "messages": MESSAGES, "add_generation_prompt": False}
        served = httpx.post(f"http://127.0.0.1:{port}/tokenize", json=body, timeout=60).raise_for_status().json()
        sample = {"samples": [{"messages": MESSAGES}]}
        trained = httpx.post(f"{url}/train?dry_run=true", json=sample, timeout=60).raise_for_status().json()
        assert trained["samples"][0]["token_ids"] == served["tokens"]
