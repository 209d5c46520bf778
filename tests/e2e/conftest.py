"""A real vLLM server at TP = 2 on CPU, once per session, and a real trainer beside it, once per module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_tp.shards.mapping import map_rank, verify_against_checkpoint
from tests.support.demo_model import make_model, standard_library_text
from tests.support.families import store_head
from tests.support.processes import coordinator_url, free_port, start_server, start_trainer
from tests.support.servers import START_SECONDS, Server, Trainer


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
