"""A real vLLM server at TP = 2 on CPU, once per session, and a real trainer beside it, once per module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import map_rank, verify_against_checkpoint
from tests.support.demo_model import make_model, standard_library_text
from tests.support.families import store_head
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer

START_SECONDS = 400.0


@dataclass
class Server:
    """A running vLLM: its address, the model it was started from, and where its manifests are."""

    url: str
    model: Path
    runtime_dir: Path
    instance: str
    process: ManagedProcess
    num_verified: tuple[int, ...] = ()
    """Per rank, checkpoint tensors that equalled the served memory bit for bit before anybody trained."""

    @property
    def manifests(self) -> list[Manifest]:
        return read_instance(self.runtime_dir / self.instance)

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """vLLM's log-probability (nats) of each token but the first."""
        body = {"model": "demo", "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        # A salt of its own keeps the request away from prefix-cache entries of other weights.
        body["cache_salt"] = json.dumps(id(body))
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]

    def mean_logprob(self, token_ids: list[int]) -> float:
        values = self.logprobs(token_ids)
        return sum(values) / len(values)


@dataclass
class Trainer:
    """A running trainer: its coordinator's address and its folders."""

    url: str
    state_dir: Path
    process: ManagedProcess

    def post(self, path: str, body: dict, timeout: float = 240) -> dict:
        response = httpx.post(f"{self.url}{path}", json=body, timeout=timeout)
        assert response.status_code < 300, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def get(self, path: str) -> dict:
        return httpx.get(f"{self.url}{path}", timeout=60).raise_for_status().json()


@pytest.fixture(scope="session")
def runtime_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rt")
    folder.chmod(0o700)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, runtime_dir: Path) -> Iterator[Server]:
    """Qwen3, 2 layers, padded vocabulary (1003), tied, with the head stored as well (as Qwen3-0.6B has it), bf16."""
    folder = tmp_path_factory.mktemp("server")
    model, port = folder / "model", free_port()
    make_model(model, standard_library_text(1000, 30), vocab_size=1003, num_layers=2)
    store_head(model)
    process = start_server(model, port, runtime_dir, folder / "server.log", instance="main")
    try:
        process.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        started = Server(f"http://127.0.0.1:{port}", model, runtime_dir, "main", process)
        started.num_verified = tuple(verify_against_checkpoint(map_rank(started.manifests, r), -1) for r in range(2))
        yield started
    finally:
        process.stop()


@pytest.fixture(scope="module")
def trainer(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Two trainer ranks with a learning rate that moves a random model visibly."""
    state_dir = tmp_path_factory.mktemp("trainer")
    process = start_trainer(
        server.runtime_dir,
        state_dir,
        state_dir / "trainer.log",
        overrides=[
            "server.instance=main", "optim.lr=1e-3", "train.max_sequence_tokens=256", "checkpoint.after_idle_seconds=null",
        ],
    )  # fmt: skip
    trainer = Trainer("", state_dir, process)
    try:
        trainer.url = coordinator_url(server.runtime_dir, process, instance="main", seconds=START_SECONDS)
        yield trainer
    finally:
        trainer.process.stop()  # a test may have put a successor in its place
